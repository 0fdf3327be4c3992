from __future__ import annotations

import gzip
import json
from pathlib import Path

import pyarrow as pa
import pytest

from pipeline.filters.balance import Balance
from pipeline.hashing import uniform
from tests.filters.barrier import check_barrier, decide
from tests.tables import make_batch

CUT, NONE = "balance", "no_entry"


@pytest.fixture
def entries(tmp_path: Path) -> str:
    path = tmp_path / "entries.json"
    path.write_text(json.dumps(["Cat", "black cat", "T-shirt", "café", "zebra", "cat", "!", "黑狗", "แมว"]))
    return str(path)


@pytest.mark.parametrize(
    ("caption", "reason"),
    [
        ("a cat", None),
        ("CAT!", None),
        ("the cat's tail", None),
        ("cats", NONE),
        ("concatenate", NONE),
        ("a t shirt", None),
        ("T-Shirts", NONE),
        ("Cafe\u0301 at night", None),  # NFKC joins the accent to its letter
        ("cafe", NONE),
        ("黑猫", NONE),
        ("cat\ncat", None),
        ("ｃａｔ", None),
        ("c\u00ada\u200bt", None),
        ("a &#99;at", None),
        ("小黑狗在草地上", None),  # wherever it occurs, where no spaces divide words
        ("白狗", NONE),
        ("แมวดำนั่ง", None),
        ("", NONE),
        (None, NONE),
    ],
)
def test_entries_match_on_word_boundaries(entries: str, caption: str | None, reason: str | None) -> None:
    check_barrier(Balance(entries=entries), [{"caption": caption}, {"caption": "a zebra"}], [reason, None])


@pytest.mark.parametrize("name", ["entries.json", "entries.txt", "entries.JSON"])
@pytest.mark.parametrize("ending", ["", ".gz", ".zst"])
def test_entries_may_be_compressed(tmp_path: Path, name: str, ending: str) -> None:
    listed = ["black cat", "café"]
    text = json.dumps(listed) if name.lower().endswith("json") else "\ufeff" + "\r\n".join(listed)
    path = tmp_path / (name + ending)
    if ending == ".zst":
        path.write_bytes(pa.compress(text.encode(), "zstd", asbytes=True))
    else:
        path.write_bytes(gzip.compress(text.encode()) if ending else text.encode())
    rows = [{"caption": "a black cat"}, {"caption": "café"}, {"caption": "cat"}]
    check_barrier(Balance(entries=str(path)), rows, [None, None, NONE])


def test_no_match_spans_two_captions(tmp_path: Path) -> None:
    (tmp_path / "entries.txt").write_text("black cat\n\n")
    rows = [{"caption": "black"}, {"caption": "cat"}, {"caption": "black   cat"}]
    check_barrier(Balance(entries=str(tmp_path / "entries.txt")), rows, [NONE, NONE, None])


def test_unmatched_rows_can_be_kept(entries: str) -> None:
    check_barrier(Balance(entries=entries, keep_unmatched=True), [{"caption": "a dog"}], [None])


def test_a_row_is_kept_with_the_probability_of_its_entries(entries: str) -> None:
    captions = ["a cat"] * 300 + ["a black cat"] * 100 + ["zebra and cat"] * 10
    batch = make_batch([{"caption": caption, "uid": f"{i:032x}"} for i, caption in enumerate(captions)])
    found = decide(Balance(entries=entries, max_per_entry=40, seed=3), batch)
    cat, black_cat = 40 / 410, 40 / 100
    chance = [cat] * 300 + [1 - (1 - cat) * (1 - black_cat)] * 100 + [1.0] * 10
    u = uniform(batch["uid"], seed=3, purpose="balance")
    assert [drop is None for drop in found] == [x < p for x, p in zip(u, chance)]
    assert found[0] in (None, (CUT, "kept with probability 0.0976; rarest entry 'cat' in 410 captions"))
    assert (CUT, "kept with probability 0.459; rarest entry 'black cat' in 100 captions") in found[300:400]


def test_a_repeated_word_counts_once(entries: str) -> None:
    rows = [{"caption": "cat cat cat cat"}, {"caption": "a cat"}]
    check_barrier(Balance(entries=entries, max_per_entry=2), rows, [None, None])


def test_the_cap_can_be_set_by_tail_mass(tmp_path: Path) -> None:
    (tmp_path / "entries.txt").write_text("a\nb\nc\nd\n")
    captions = [word for word, n in [("a", 1), ("b", 4), ("c", 15), ("d", 80)] for _ in range(n)]
    batch = make_batch([{"caption": caption, "uid": f"{i:032x}"} for i, caption in enumerate(captions)])
    # a and b have 5% of the matches, with c 20%, so from 6% on c's count is the cap.
    found = decide(Balance(entries=str(tmp_path / "entries.txt"), tail_mass=0.06), batch)
    assert found == decide(Balance(entries=str(tmp_path / "entries.txt"), max_per_entry=15), batch)
    assert found[:20] == [None] * 20
    assert found.count(None) < 50


def test_entries_default_to_the_words_and_pairs_of_the_run() -> None:
    captions = ["a red car"] * 6 + ["A RED bus"] * 3 + ["one bus"] * 2 + ["nothing like it", "", None]
    step = Balance(min_count=3, max_per_entry=5)
    found = decide(step, make_batch([{"caption": caption, "uid": f"{i:032x}"} for i, caption in enumerate(captions)]))
    assert {drop and drop[0] for drop in found[:6]} <= {None, CUT}
    assert found[6:11] == [None] * 5  # "bus" is in five captions
    assert [drop and drop[0] for drop in found[11:]] == [NONE, NONE, NONE]


def test_only_the_most_frequent_entries_are_taken() -> None:
    captions = ["x"] * 4 + ["y"] * 3 + ["b"] * 2 + ["a"] * 2
    step = Balance(min_count=1, max_entries=3)
    check_barrier(step, [{"caption": caption} for caption in captions], [None] * 7 + [NONE] * 2 + [None] * 2)


def test_seeds_differ(entries: str) -> None:
    batch = make_batch([{"caption": "a cat"}] * 50)
    one, other = (decide(Balance(entries=entries, max_per_entry=25, seed=seed), batch) for seed in (0, 1))
    assert one != other


def test_the_contents_of_the_entries_determine_the_result(tmp_path: Path) -> None:
    path = tmp_path / "entries.txt"
    path.write_text("cat")
    before = Balance(entries=str(path)).fingerprint()
    path.write_text("dog")
    assert Balance(entries=str(path)).fingerprint() != before


@pytest.mark.parametrize(
    ("name", "content", "problem"),
    [
        ("missing.json", None, "No such file"),
        ("bad.json", b"[", "Expecting value"),
        ("object.json", b'{"cat": 1}', "expected a JSON list of strings"),
        ("numbers.json", b"[1, 2]", "expected a JSON list of strings"),
        ("empty.json", b"[]", "has no entry"),
        ("blank.txt", b"\n  \n--\n", "has no entry"),
        ("latin1.txt", b"caf\xe9", "can't decode"),
        ("plain.txt.gz", b"cat", "gzip"),
        ("cut.txt.gz", gzip.compress(b"cat " * 1000)[:-20], "damaged"),
        ("cut.txt.zst", b"(\xb5/\xfd", "cannot read"),
        ("surrogate.json", b'["\\ud800"]', "surrogates"),
    ],
)
def test_an_invalid_file_is_reported(tmp_path: Path, name: str, content: bytes | None, problem: str) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    ((key, message),) = Balance(entries=str(tmp_path / name)).check()
    assert key == "entries"
    assert problem in message
    assert name in message


@pytest.mark.parametrize(
    ("options", "key"),
    [
        ({"max_per_entry": 5, "tail_mass": 0.1}, "tail_mass"),
        ({"max_per_entry": 0}, "max_per_entry"),
        ({"tail_mass": 6.0}, "tail_mass"),
        ({"min_count": 0}, "min_count"),
        ({"max_entries": 0}, "max_entries"),
    ],
)
def test_invalid_options_are_reported(options: dict, key: str) -> None:
    assert [k for k, _ in Balance(**options).check()] == [key]
