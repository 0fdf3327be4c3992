from __future__ import annotations

import gzip
import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from pipeline.filters.balance import Balance
from pipeline.stages.match_entries import MatchEntries
from pipeline.text.hashing import uniform
from tests.filters.barrier import check_barrier, decide, figures
from tests.tables import make_batch, run_step

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


def metaclip_reference(
    lists: list[list[str]], languages: list[str], u: np.ndarray, reference: str, t: int
) -> tuple[np.ndarray, dict[str, float]]:
    """MetaCLIP's balancing as its papers state it, one caption at a time: which rows are kept, and each language's t.

    Each matched entry keeps a caption with probability t / count, so all of them miss it with Π (1 − t / count).
    """
    counts: dict[str, dict[str, int]] = {}
    for language, entries in zip(languages, lists):
        for entry in entries:
            frequencies = counts.setdefault(language, {})
            frequencies[entry] = frequencies.get(entry, 0) + 1
    main = np.array(list(counts[reference].values()))
    tail_share = main[main < t].sum() / main.sum()
    caps: dict[str, float] = {}
    for language, frequencies in counts.items():
        ascending = np.sort(np.array(list(frequencies.values())))
        reached = np.cumsum(ascending) / ascending.sum() >= tail_share - 1e-12
        caps[language] = t if language == reference else ascending[np.argmax(reached)]
    kept = []
    for language, entries, x in zip(languages, lists, u):
        missed = 1.0
        for entry in entries:
            missed *= 1 - min(1.0, caps[language] / counts[language][entry])
        kept.append(x < 1 - missed)
    return np.array(kept), caps


@pytest.fixture(scope="module")
def zipf() -> list[dict[str, Any]]:
    """Rows in three languages, of different sizes, whose entries are distributed by Zipf's law."""
    rng = np.random.default_rng(0)
    rows = []
    for language, n in [("en", 1500), ("de", 400), ("th", 60)]:
        for _ in range(n):
            entries = sorted({f"{word}" for word in rng.zipf(1.5, 4) if word < 200})
            rows.append({"language": language, "entries": entries, "uid": f"{len(rows):032x}"})
    return rows


def test_languages_are_balanced_as_in_metaclip(zipf: list[dict[str, Any]]) -> None:
    step = Balance(column="entries", by="language", max_per_entry=60, seed=5)
    batch = make_batch(zipf)
    u = uniform(batch["uid"], seed=5, purpose="balance")
    kept, caps = metaclip_reference([r["entries"] for r in zipf], [r["language"] for r in zipf], u, "en", 60)
    found = decide(step, batch)
    assert [drop is None for drop in found] == kept.tolist()
    assert {f["language"]: f["cap"] for f in figures(step, batch)} == caps
    assert caps["de"] < 60  # a smaller language has a smaller t
    assert any("captions in de" in drop[1] for drop in found if drop and drop[1])


def test_figures_count_matches_before_and_after(zipf: list[dict[str, Any]]) -> None:
    rows = [{**row, "language": "en"} for row in zipf]
    step = Balance(column="entries", max_per_entry=100)
    batch = make_batch(rows)
    before = Counter(entry for row in rows for entry in row["entries"])
    fates = zip(rows, decide(step, batch))
    after = Counter(entry for row, drop in fates if drop is None for entry in row["entries"])
    found = figures(step, batch)
    assert [f["at_least"] for f in found] == sorted({1 << (n.bit_length() - 1) for n in before.values()})
    for f in found:
        within = [entry for entry, n in before.items() if f["at_least"] <= n < 2 * f["at_least"]]
        expected = {
            "language": None,
            "cap": 100,
            "entries": len(within),
            "matches": sum(before[entry] for entry in within),
            "kept": sum(after[entry] for entry in within),
        }
        assert {key: f[key] for key in expected} == expected
    assert sum(f["kept"] for f in found) < sum(f["matches"] for f in found)


def test_without_the_reference_all_languages_have_its_cap(zipf: list[dict[str, Any]]) -> None:
    step = Balance(column="entries", by="language", max_per_entry=60, reference="fr")
    assert {f["cap"] for f in figures(step, make_batch(zipf))} == {60}


def test_with_a_tail_mass_each_language_has_its_own_cap(zipf: list[dict[str, Any]]) -> None:
    found = figures(Balance(column="entries", by="language", tail_mass=0.3), make_batch(zipf))
    for language in ("en", "de", "th"):
        bands = [f for f in found if f["language"] == language]
        rare = sum(f["matches"] for f in bands if 2 * f["at_least"] <= bands[0]["cap"])
        assert rare <= 0.3 * sum(f["matches"] for f in bands)


def test_languages_count_the_same_entry_apart(entries: str) -> None:
    rows = [{"caption": "a cat", "language": language} for language in ["en"] * 40 + ["de"] * 2 + [None]]
    found = decide(Balance(entries=entries, by="language", tail_mass=0.5), make_batch(rows))
    assert found[40:] == [None] * 3
    found = decide(Balance(min_count=3, by="language"), make_batch(rows))
    assert [drop and drop[0] for drop in found] == [None] * 40 + [
        NONE
    ] * 3  # "a cat" is a frequent pair in English alone


def test_balancing_twice_is_balancing_once(zipf: list[dict[str, Any]]) -> None:
    for options in ({}, {"by": "language"}):
        step = Balance(column="entries", max_per_entry=50, reference="none", **options)
        kept = [row for row, drop in zip(zipf, decide(step, make_batch(zipf))) if drop is None]
        assert len(kept) < len(zipf)
        assert decide(step, make_batch(kept)) == [None] * len(kept)


def test_the_column_of_match_entries_gives_the_same_as_its_file(entries: str) -> None:
    captions = ["a cat", "a black cat", "T-shirt", "小黑狗", "nothing", None] * 30
    rows = [{"caption": caption, "uid": f"{i:032x}"} for i, caption in enumerate(captions)]
    matched, _ = run_step(MatchEntries(entries=entries), make_batch(rows))
    found = decide(Balance(column="entries", max_per_entry=20), matched)
    assert found == decide(Balance(entries=entries, max_per_entry=20), make_batch(rows))


def test_columns_of_another_type_are_reported() -> None:
    step = Balance(column="entries", by="language")
    types = {"entries": pa.string(), "language": pa.int32()}
    assert [key for key, _ in step.check_columns(types)] == ["column", "by"]
    assert not list(step.check_columns({"entries": pa.list_(pa.string()), "language": pa.string()}))


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
        ("cut.txt.gz", gzip.compress(b"cat " * 1000, mtime=0)[:-20], "damaged"),
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
        ({"entries": __file__, "column": "entries"}, "column"),
        ({"max_per_entry": 0}, "max_per_entry"),
        ({"tail_mass": 6.0}, "tail_mass"),
        ({"min_count": 0}, "min_count"),
        ({"max_entries": 0}, "max_entries"),
    ],
)
def test_invalid_options_are_reported(options: dict, key: str) -> None:
    assert [k for k, _ in Balance(**options).check()] == [key]
