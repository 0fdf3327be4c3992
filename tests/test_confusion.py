from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline import confusion

TEXTS = [
    ("A brown dog runs across a field of grass with a stick in its mouth.", "en"),
    ("an old man sits on a bench reading a newspaper", "en"),
    ("Ein brauner Hund rennt mit einem Stock im Maul über eine Wiese.", "de"),
    ("Deux enfants jouent sur la plage au bord de l'eau", "de"),  # labelled wrongly
    ("Deux enfants jouent sur la plage", None),
    (None, "de"),
]


@pytest.fixture
def table(tmp_path: Path) -> str:
    path = tmp_path / "known.parquet"
    pq.write_table(pa.table({"text": [text for text, _ in TEXTS], "language": [code for _, code in TEXTS]}), path)
    return str(path)


def test_the_table_has_recall_precision_and_confusions(table: str, capsys) -> None:
    assert confusion.main([table, "--caption", "text"]) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert lines[1:3] == [["de", "2", "50.0%", "100.0%", "fr", "1"], ["en", "2", "100.0%", "100.0%"]]
    assert lines[3] == ["4", "captions,", "75.00%", "recognised"]


def test_a_caption_below_the_minimum_has_no_language(table: str, capsys) -> None:
    assert confusion.main([table, "--caption", "text", "--min-score", "1"]) == 0
    assert "unsure" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        ([], "has no column 'caption'; it has text, language"),
        (["--caption", "text", "--truth", "lang"], "no file has lang"),
        (["--caption", "text", "--min-score", "30"], "--min-score: must be between 0 and 1"),
        (["--caption", "text", "--model", "no.bin"], "--model: 'no.bin'"),
    ],
)
def test_a_wrong_table_is_reported(table: str, words: list[str], problem: str, capsys) -> None:
    assert confusion.main([table, *words]) == 2
    assert problem in capsys.readouterr().err.replace("\n", " ")
