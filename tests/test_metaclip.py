"""The shipped recipes that rebuild the data set of a paper: each passes the checks, has a plan, and names its paper."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from pipeline import run
from tests.conftest import ROOT

LANGUAGES = ("en", "de", "fr", "es", "it", "pt", "ru", "ja", "zh", "th")


@pytest.mark.parametrize(
    ("recipe", "lists"),
    [("metaclip", ["entries.tsv"]), ("multilingual", [f"entries/{language}.tsv" for language in LANGUAGES])],
)
def test_a_recipe_passes_plan(recipe: str, lists: list[str], tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    for name in lists:
        Path(name).parent.mkdir(exist_ok=True)
        Path(name).write_text("entry\tword_count\ncat\t100\n")
    Path("pool").mkdir()
    pq.write_table(pa.table({"url": ["http://a/1"], "caption": ["a cat"]}), "pool/0.parquet")
    path = ROOT / f"conf/{recipe}.yaml"
    assert run.main([str(path), "--plan"]) == 0
    planned = capsys.readouterr().out
    assert all(step in planned for step in ("match_entries", "balance", "write_shards"))
    named = yaml.safe_load(path.read_text())["steps"]
    assert sorted(lists) == sorted(
        _files(next(line["match_entries"]["entries"] for line in named if "match_entries" in line))
    )


def _files(entries: str | dict[str, str]) -> list[str]:
    return [entries] if isinstance(entries, str) else list(entries.values())
