"""A missing, damaged or wrong file that a step names ends the command with status 2 before the run starts, and the
error names the file."""

from __future__ import annotations

import gzip
import io
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from pipeline.run import main
from tests.images import encoded

WIDTH = 8
"""Dimension of the pool's vectors."""


def npy(array: Any) -> bytes:
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


def npz(**arrays: Any) -> bytes:
    file = io.BytesIO()
    np.savez(file, **arrays)
    return file.getvalue()


def safetensors(**arrays: np.ndarray) -> bytes:
    from safetensors.numpy import save

    return save(arrays)


VECTORS = np.random.default_rng(0).normal(size=(5, WIDTH)).astype(np.float32)
WEIGHT, BIAS = np.ones((1, WIDTH), np.float32), np.zeros(1, np.float32)
WORDS = "cat\nblack dog\n" * 40
MIXTURE = {
    "format": "winnow.score_mixture/1", "about": {}, "bias": 0.0,
    "columns": {"v": {"weight": [0.5] * WIDTH, "missing": 0.0}},
}  # fmt: skip
HEAD = {"weight": WEIGHT, "bias": BIAS}


def mixture(**changes: Any) -> bytes:
    return json.dumps({**MIXTURE, **changes}).encode()


WRONG_VECTORS: dict[str, tuple[bytes, str]] = {
    "another width": (npy(np.ones((5, 4), np.float32)), "has shape (5, 4), and v has 8 dimensions"),
    "one vector": (npy(np.ones(8, np.float32)), "expected vectors of shape (m, d), found (8,)"),
    "no vectors": (npy(np.ones((0, 8), np.float32)), "expected vectors of shape (m, d), found (0, 8)"),
    "no width": (npy(np.ones((5, 0), np.float32)), "expected vectors of shape (m, d), found (5, 0)"),
    "integers": (npy(np.ones((5, 8), np.int64)), "expected finite floats, found int64"),
    "text": (npy(np.full((5, 8), "x")), "expected finite floats, found <U1"),
    "NaN": (npy(np.full((5, 8), np.nan)), "NaN"),
    "beyond float32": (npy(np.full((5, 8), 1e39)), "float32"),
    "a pickle": (npy(np.array([{}], dtype=object)), "not a .npy file of numbers"),
    "several arrays": (npz(a=VECTORS), "expected vectors of shape (m, d), found several arrays"),
    "a shape that is too large": (
        npy(VECTORS).replace(b"(5, 8), }      ", b"(9000000000,8)}"), "not a .npy file of numbers",
    ),
}  # fmt: skip
WRONG_HEADS: dict[str, tuple[bytes, str]] = {
    "another width": (npz(weight=np.ones((1, 4)), bias=BIAS), "expects 4 dimensions, but v has 8"),
    "two outputs": (npz(weight=np.ones((2, 8)), bias=BIAS), "expected one `weight` of shape (1, d)"),
    "no bias": (npz(weight=WEIGHT), "found weight (1, 8)"),
    "NaN": (npz(weight=WEIGHT * np.nan, bias=BIAS), "NaN"),
    "text": (npz(weight=np.full((1, 8), "x"), bias=BIAS), "expected numbers, found weight <U1"),
    "one array": (npy(VECTORS), "not a linear head"),
}
WRONG_WORDS: dict[str, tuple[bytes, str]] = {
    "UTF-16": (WORDS.encode("utf-16"), "can't decode"),
    "Latin-1": (b"caf\xe9\n", "can't decode"),
    "no words": (b"--\n!\n", "no entry"),
    "NUL": (b"\0\0\0", "no entry"),
}
# Each kind of file: its name, a valid one, the step that names it ({} is the path), and invalid ones with their errors.
KINDS: dict[str, tuple[str, bytes, str, dict[str, tuple[bytes, str]]]] = {
    "norm_sim": ("t.npy", npy(VECTORS), "norm_sim: {{target: {}, vector: v}}", WRONG_VECTORS),
    "image_cluster": ("t.npy", npy(VECTORS), "image_cluster: {{target: {}, vector: v}}", WRONG_VECTORS),
    "decontaminate vectors": (
        "t.npy", npy(VECTORS), "decontaminate: {{vectors: {{coco: {}}}, vector: v}}", WRONG_VECTORS,
    ),
    "head npz": ("h.npz", npz(**HEAD), "linear_head: {{head: {}, column: s, vector: v}}", WRONG_HEADS),
    "head safetensors": (
        "h.safetensors", safetensors(**HEAD), "linear_head: {{head: {}, column: s, vector: v}}",
        {"another width": (safetensors(weight=np.ones((1, 4), np.float32), bias=BIAS), "expects 4 dimensions")},
    ),
    "head torch": ("h.pth", b"", "linear_head: {{head: {}, column: s, vector: v}}", {}),
    "match_entries": (
        "e.tsv", b"entry\tword_count\ncat\t3\n", "match_entries: {{entries: {}}}",
        {"no header": (b"cat\t3\n", "expected a first line with a column 'entry'"),
         "UTF-16": (WORDS.encode("utf-16"), "can't decode")},
    ),
    "match_entries by language": (
        "e.txt", WORDS.encode(), "match_entries: {{entries: {{en: {}}}, by: caption}}", WRONG_WORDS,
    ),
    "balance": (
        "e.json", b'["cat"]', "balance: {{entries: {}}}",
        {"a mapping": (b'{"cat": 1}', "expected a JSON list of strings"),
         "numbers": (b"[1]", "expected a JSON list of strings"),
         "a deep nest": (b"[" * 100_000, "cannot read")},
    ),
    "balance gz": (
        "e.txt.gz", gzip.compress(WORDS.encode()), "balance: {{entries: {}}}", {"plain": (b"cat\n", "gzip")},
    ),
    "balance zst": (
        "e.txt.zst", pa.compress(WORDS.encode(), "zstd", asbytes=True), "balance: {{entries: {}}}",
        {"plain": (b"cat\n", "cannot read")},
    ),
    "caption_entries": ("e.txt", WORDS.encode(), "caption_entries: {{entries: {}}}", WRONG_WORDS),
    "text_safety": ("e.txt", WORDS.encode(), "text_safety: {{words: {}}}", WRONG_WORDS),
    "takedown": (
        "t.txt", b"domain example.org\n", "takedown: {{file: {}}}",
        {"UTF-16": ("domain example.org\n".encode("utf-16"), "not UTF-8"),
         "another list": (b"example.org\n", "expected one of uid, url, domain, sha256, phash"),
         "comments": (b"# nothing yet\n", "lists nothing")},
    ),
    "deny_hashes": (
        "d.txt", b"d41d8cd98f00b204e9800998ecf8427e\n", "download: {{inline: true, deny_hashes: {}}}",
        {"UTF-16": ("d41d8cd98f00b204e9800998ecf8427e\n".encode("utf-16"), "is not an md5"),
         "names": (b"cat.jpg\n", "is not an md5"),
         "comments": (b"# nothing yet\n", "lists nothing")},
    ),
    "block_hosts": (
        "h.txt", b"example.org\n", "url_filter: {{block_hosts: {}}}",
        {"UTF-16": ("example.org\n".encode("utf-16"), "can't decode"),
         "urls": (b"http://example.org/\n", "is not a host name"),
         "comments": (b"# nothing yet\n", "lists no host")},
    ),
    "language": (
        "lid.ftz", b"", "language: {{model: {}}}",
        {"text": (b"not a model at all\n" * 100, "is not a fastText model")},
    ),
    "learned_score": (
        "m.json", mixture(), "learned_score: {{mixture: {}}}",
        {"another width": (
             mixture(columns={"v": {"weight": [1, 2], "missing": 0}}), "expects 2 dimensions, but 'v' has 8"),
         "another kind": (
             mixture(columns={"v": {"knots": [0], "values": [1], "missing": 0}}), "expects numbers in 'v'"),
         "NaN": (mixture(bias=float("nan")), "NaN"),
         "a deep nest": (b"[" * 100_000, "not a mixture"),
         "a list": (b"[]", "not a mixture")},
    ),
    "decontaminate sets": (
        "eval", b"", "decontaminate: {{sets: {{coco: {}}}}}",
        {"no picture": (b"not a picture", "take it out of the set")},
    ),
}  # fmt: skip
LISTS = {"match_entries", "match_entries by language", "caption_entries", "text_safety", "takedown", "deny_hashes",
         "block_hosts"}  # fmt: skip
"""Kinds for which a truncated file is still valid."""


@pytest.fixture
def planned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., Any]:
    """`planned(step)`: exit status and error text of a plan of a recipe with this step."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("COLUMNS", "300")
    os.mkdir("pool")
    table = pa.table(
        {
            "url": ["http://a.example/1.jpg"], "caption": ["a cat"], "phash": pa.array([1], pa.uint64()),
            "v": pa.array([VECTORS[0]], pa.list_(pa.float32(), WIDTH)),
            "picture": [encoded(Image.effect_noise((40, 40), 80).convert("RGB"))],
        }
    )  # fmt: skip
    pq.write_table(table, "pool/0.parquet")

    def plan(step: str) -> tuple[int, str]:
        image = ", image: picture, columns: [v]" if "inline" in step else ", columns: [v]"
        above = "  - download: {inline: true}\n" if "decontaminate: {sets" in step else ""
        image = ", image: picture, columns: [v]" if above else image
        Path("r.yaml").write_text(
            f"name: r\npool: {{path: pool{image}}}\nrun: out\nsteps:\n{above}  - {step}\n  - write_subset\n"
        )
        status = main(["r.yaml", "--plan"])
        return status, capsys.readouterr().err

    return plan


CASES = [
    *((kind, how, None) for kind in KINDS for how in ("missing", "empty", "a folder")),
    *((kind, "cut", None) for kind, (_, good, *_) in KINDS.items() if good and kind not in LISTS),
    *((kind, how, content) for kind, (*_, wrong) in KINDS.items() for how, (content, _) in wrong.items()),
]


@pytest.mark.parametrize(("kind", "how", "content"), CASES, ids=[f"{kind}: {how}" for kind, how, _ in CASES])
def test_a_file_that_cannot_be_used_is_named_before_the_start(
    kind: str, how: str, content: bytes | None, planned: Callable[..., Any]
) -> None:
    name, good, step, wrong = KINDS[kind]
    if kind == "decontaminate sets":
        if how == "empty" or content is not None:
            os.mkdir(name)
            (Path(name) / "a.png").write_bytes(content or b"")
        elif how == "a folder":
            os.mkdir(name)
    elif how == "a folder":
        os.mkdir(name)
    elif how != "missing":
        Path(name).write_bytes(good[: len(good) // 2] if how == "cut" else b"" if content is None else content)
    status, output = planned(step.format(name))
    assert status == 2, output
    assert name in output
    assert "Traceback" not in output
    if how in wrong:
        assert wrong[how][1] in output
    assert not Path("out").exists()


@pytest.mark.parametrize("kind", [kind for kind, (_, good, *_) in KINDS.items() if good])
def test_a_plan_accepts_valid_files(kind: str, planned: Callable[..., Any]) -> None:
    name, good, step, _ = KINDS[kind]
    Path(name).write_bytes(good)
    status, output = planned(step.format(name))
    assert status == 0, output


@pytest.mark.parametrize("share", [0.00005, 0.01, 0.3, 0.6, 0.9, 0.999])
def test_a_truncated_language_model_is_reported(share: float, planned: Callable[..., Any]) -> None:
    from pipeline.stages.language import _path

    data = _path(None).read_bytes()
    Path("lid.ftz").write_bytes(data[: int(share * len(data))])
    status, output = planned("language: {model: lid.ftz}")
    assert status == 2, output
    assert "lid.ftz" in output


@pytest.mark.parametrize(
    ("step", "message"),
    [
        ("text_overlap: {engine: no_such_package:Engine}", "no module named no_such_package"),
        ("text_safety: {scorer: nothing}", "expected an import path"),
        ("image_safety: {scorer: 'tests.plugins:Missing'}", "tests.plugins has no Missing"),
        ("download: {inline: true, blur_detector: 'tests.plugins:Missing'}", "tests.plugins has no Missing"),
        ("text_overlap: {engine: 'tests.plugins:Missing'}", "tests.plugins has no Missing"),
    ],
)
def test_a_missing_plugin_is_reported(step: str, message: str, planned: Callable[..., Any]) -> None:
    status, text = planned(step)
    assert status == 2
    assert message in text
