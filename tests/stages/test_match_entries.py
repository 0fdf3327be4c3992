from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pytest

from pipeline.stages.match_entries import MatchEntries
from tests.tables import make_batch, run_step


@pytest.fixture
def files(tmp_path: Path) -> dict[str, str]:
    lists = {"en": "cat\nblack cat\nred", "de": "Hund\nRed Bull", "th": "แมว", "zh": "黑狗\n狗"}
    for language, text in lists.items():
        (tmp_path / f"{language}.txt").write_text(text)
    return {language: str(tmp_path / f"{language}.txt") for language in lists}


@pytest.mark.parametrize(
    ("caption", "entries"),
    [
        ("A black CAT, red", ["cat", "black cat", "red"]),
        ("cat cat", ["cat"]),
        ("cats", []),
        ("", []),
        (None, []),
    ],
)
def test_entries_are_listed_once_in_the_order_of_the_file(
    files: dict[str, str], caption: str | None, entries: list[str]
) -> None:
    kept, drops = run_step(MatchEntries(entries=files["en"]), make_batch([{"caption": caption}]))
    assert kept["entries"].to_pylist() == [entries]
    assert not len(drops)
    assert kept.schema.field("entries").type == MatchEntries.adds["entries"]


def test_a_caption_is_compared_with_the_entries_of_its_language(files: dict[str, str]) -> None:
    rows = [
        ("a red cat and a Hund", "en", ["cat", "red"]),
        ("ein Hund, red bull", "de", ["hund", "red bull"]),
        ("cat", "fr", []),
        ("cat", None, []),
        ("แมวดำนั่ง", "th", ["แ ม ว"]),  # no spaces divide words: each character counts as one
        ("小黑狗", "zh", ["黑 狗", "狗"]),
        (None, "en", []),
        ("red", "en", ["red"]),
    ]
    batch = make_batch([{"caption": caption, "language": language} for caption, language, _ in rows])
    kept, _ = run_step(MatchEntries(entries=files), batch)
    assert kept["entries"].to_pylist() == [entries for *_, entries in rows]
    # A row's entries do not depend on its neighbours.
    for i, (*_, entries) in enumerate(rows):
        alone, _ = run_step(MatchEntries(entries=files), batch.slice(i, 1))
        assert alone["entries"].to_pylist() == [entries]


@pytest.mark.parametrize(
    ("entry", "caption", "matches"),
    [
        ("ปลา", "แมวกินปลาสด", True),
        ("ປາ", "ແມວກິນປາ", True),
        ("ကြောင်", "ကြောင်ဖြူ", True),
        ("ឆ្មា", "ឆ្មាខ្មៅ", True),
        ("བྱི་ལ", "བྱི་ལ་ནག་པོ", True),
        ("东京", "我爱东京塔", True),
        ("コーヒー", "熱いコーヒーカップ", True),
        # Scripts mixed in one caption: Latin words keep their borders.
        ("cat", "新しい猫cat写真", True),
        ("cat", "แมวcatดำ", True),
        ("cat", "猫catalogue", False),
        ("東京 tower", "夜の東京Tower", True),
        ("iPhone 15", "我的iPhone 15手机", True),
        ("15", "我的iPhone15手机", False),
        # Scripts with spaces have borders: Korean, Arabic, Hindi.
        ("한국", "한국의 집", False),
        ("قطة", "قطة سوداء", True),
        ("قط", "قطة سوداء", False),
        ("बिल्ली", "काली बिल्लीयाँ", False),
    ],
)
def test_words_have_borders_where_a_script_has_spaces(tmp_path: Path, entry: str, caption: str, matches: bool) -> None:
    (tmp_path / "e.txt").write_text(entry)
    kept, _ = run_step(MatchEntries(entries=str(tmp_path / "e.txt")), make_batch([{"caption": caption}]))
    assert bool(kept["entries"].to_pylist()[0]) == matches


def test_the_column_of_languages_is_checked(files: dict[str, str]) -> None:
    step = MatchEntries(entries=files, by="lang")
    assert step.needs == ("caption", "lang")
    assert [key for key, _ in step.check_columns({"lang": pa.int32()})] == ["by"]
    assert MatchEntries(entries=files["en"]).needs == ("caption",)


@pytest.mark.parametrize(
    ("content", "problem"),
    [(None, "No such file"), ("entry\n!", "no entry"), ("entri\ncat", "a column 'entry', found entri")],
)
def test_an_invalid_file_is_reported(tmp_path: Path, content: str | None, problem: str) -> None:
    path = tmp_path / "list.tsv"
    if content is not None:
        path.write_text(content)
    for entries in (str(path), {"en": str(path)}):
        ((key, message),) = MatchEntries(entries=entries).check()
        assert key == "entries"
        assert problem in message
        assert "list.tsv" in message
    assert [key for key, _ in MatchEntries(entries={}).check()] == ["entries"]


def test_the_contents_of_the_files_determine_the_result(files: dict[str, str]) -> None:
    before = MatchEntries(entries=files).fingerprint()
    Path(files["de"]).write_text("Katze")
    assert MatchEntries(entries=files).fingerprint() != before
