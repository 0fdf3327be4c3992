from __future__ import annotations

import json
from pathlib import Path

import pytest

from pipeline.filters.caption_entries import CaptionEntries
from tests.tables import check_filter


def test_captions_with_an_entry_are_kept(tmp_path: Path) -> None:
    path = tmp_path / "entries.json"
    path.write_text(json.dumps(["Great white shark", "goldfish", "café", "猫"]))
    captions = [
        ("A GREAT  white-shark!", None),
        ("two goldfish, one bowl", None),
        ("goldfishes", "no_entry"),
        ("great shark", "no_entry"),
        ("Cafe\u0301 terrace", None),  # decomposed
        ("白い猫です", None),
        ("", "no_entry"),
        (None, "no_entry"),
    ]
    rows = [{"caption": caption, "url": f"http://a/{i}"} for i, (caption, _) in enumerate(captions)]
    check_filter(CaptionEntries(entries=str(path)), rows, [reason for _, reason in captions])


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("none.txt", None, "cannot read"),
        ("a.json", b"{}", "expected a JSON list of strings"),
        ("a.txt", b"\xff\xfe", "cannot read"),
        ("a.txt", b"...\n", "has no entry with a letter or digit"),
    ],
)
def test_unusable_lists(name: str, content: bytes | None, message: str, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    ((key, problem),) = CaptionEntries(entries=str(tmp_path / name)).check()
    assert key == "entries"
    assert message in problem


def test_a_changed_list_is_another_step(tmp_path: Path) -> None:
    prints = []
    for word in ("cat", "dog"):
        (tmp_path / "a.txt").write_text(word)
        prints.append(CaptionEntries(entries=str(tmp_path / "a.txt")).fingerprint())
    assert prints[0] != prints[1]
