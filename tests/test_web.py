"""The main job on a small hostile web: every row ends where it belongs, for the right reason."""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from pathlib import Path

import pytest

from pipeline.demo import truth, web
from tests.conftest import Command

RECIPE = """
name: small-web
pool: {path: web/pool.parquet}
run: out
steps:
  - caption_length: {min_chars: 6, min_words: 3}
  - caption_pattern: {}
  - language: {keep: [en]}
  - exact_dedup: {by: [url]}
  - download: {image_size: 96, timeout: 10, allow_addrs: ["127.0.0.1:@PORT@"]}
  - image_size: {min_side: 32}
  - aspect_ratio: {max: 3.0}
  - exact_dedup: {by: [sha256]}
  - near_dedup: {max_hamming: 4}
  - write_shards: {samples_per_shard: 50}
"""
# Kinds of row that must all be dropped by one step, and the reasons that are right for them.
WHY = {
    "short": ("caption_length", {"too_few_words"}),
    "tiny": ("image_size", {"too_small"}),
    "banner": ("aspect_ratio", {"too_elongated"}),
    "html": ("download", {"not_an_image"}),
    "svg": ("download", {"not_an_image"}),
    "empty": ("download", {"empty_body"}),
    "garbage": ("download", {"not_an_image", "decode_error"}),
    "corrupt": ("download", {"decode_error"}),
    "pixel_bomb": ("download", {"too_large"}),
    "dead": ("download", {"http_404"}),
    "gone": ("download", {"http_410"}),
    "forbidden": ("download", {"http_403"}),
    "error": ("download", {"http_500"}),
    "loop": ("download", {"redirect_loop", "too_many_redirects"}),
    "truncated": ("download", {"body_truncated"}),
    "stalled": ("download", {"too_slow", "deadline"}),
    "endless": ("download", {"body_too_large", "deadline", "too_slow"}),
    "gzip_bomb": ("download", {"content_encoding"}),
    "long_header": ("download", {"empty_body"}),
    "not_http": ("download", {"bad_response"}),
    "reset": ("download", {"reset", "connect"}),
    "no_tls": ("download", {"tls"}),
    "opted_out": ("download", {"opted_out"}),
    "private": ("download", {"addr_denied", "bad_url"}),
    "bad_url": ("download", {"bad_url", "bad_scheme"}),
    "bad_redirect": ("download", {"bad_scheme"}),
}
TEXT_STEPS = {"pool", "caption_length", "caption_pattern", "language", "exact_dedup"}


@pytest.fixture
def served(tmp_path: Path) -> Path:
    """`tmp_path` with a small web in `web/`, being served, and a recipe for it."""
    with web.open_port(0) as server:
        web.build(tmp_path / "web", 150, 7, server.server_port)
        (tmp_path / "r.yaml").write_text(RECIPE.replace("@PORT@", str(server.server_port)))
        with web.serving(server, tmp_path / "web"):
            yield tmp_path


def test_every_row_of_a_hostile_web_ends_where_it_belongs(run: Command, served: Path) -> None:
    done = run("r.yaml")
    assert done.returncode == 0, done.stderr
    rows, kept, drops = truth.read(served / "out", served / "web")
    funnel = json.loads((served / "out/funnel.json").read_text())
    assert funnel["rows_in"] == len(rows)
    fates: dict[str, Counter[tuple[str, str]]] = defaultdict(Counter)
    for row in rows:
        pair = (row["url"], row["caption"])
        fates[row["kind"]][("kept", "") if pair in kept else drops[pair]] += 1
    for kind, (step, reasons) in WHY.items():
        for (where, reason), n in fates[kind].items():
            # A text step may have dropped a row before its picture could be wrong.
            assert where in TEXT_STEPS or (where == step and reason in reasons), f"{kind}: {n} rows {where}: {reason}"
    for kind in ("flaky", "moved", "other_bot", "throttled", "other_format", "mismatched"):
        dropped = {fate: n for fate, n in fates[kind].items() if fate[0] not in {"kept", *TEXT_STEPS, "near_dedup"}}
        assert not dropped, f"{kind}: {dropped}"
    score = truth.judge(rows, kept, drops)
    recall = {kind.kind: kind.recall for kind in score.kinds}
    assert recall["clean"] >= 0.95
    assert recall["not_english"] >= 0.9
    assert recall["boilerplate"] >= 0.9
    assert recall["exact_copy"] == recall["same_url"] == 1.0
    assert recall["near_copy"] >= 0.8
    assert fates["placeholder"][("kept", "")] <= 1
