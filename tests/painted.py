"""Small finished runs that need no network: pictures, a score, a language and embeddings painted from the captions."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from tests.conftest import HUNG, environment, quick

STEP = '''
import io, time
from dataclasses import dataclass
from PIL import Image
import numpy as np
import pyarrow as pa
from pipeline.step import Stage


@dataclass(kw_only=True)
class Paint(Stage):
    """A picture, two scores, a language and an embedding, all functions of the number that ends a caption."""
    needs = ("caption",)
    adds = {"image": pa.binary(), "shade": pa.float32(), "depth": pa.float64(), "language": pa.string(),
            "image_embedding": pa.list_(pa.float16(), 4)}
    expensive = True
    slow: float = 0.0

    def process(self, batch):
        numbers = [int(caption.split()[-1]) for caption in batch["caption"].to_pylist()]
        images = []
        for n in numbers:
            out = io.BytesIO()
            Image.new("RGB", (24, 16), (n % 256, n // 256 % 256, 90)).save(out, "JPEG")
            images.append(out.getvalue())
            time.sleep(self.slow)
        angles = np.array(numbers, float) / 100
        vectors = np.stack([np.cos(angles), np.sin(angles), 0 * angles, 0 * angles], axis=1).astype(np.float16)
        columns = {
            "image": pa.array(images, pa.binary()),
            "shade": pa.array([None if n % 50 == 49 else n * 7 % 100 / 100 for n in numbers], pa.float32()),
            "depth": pa.array([n * 3 % 50 / 50 for n in numbers], pa.float64()),
            "language": pa.array(["de" if n % 3 == 0 else "en" for n in numbers], pa.string()),
            "image_embedding": pa.FixedSizeListArray.from_arrays(pa.array(vectors.reshape(-1)), 4),
        }
        for name, values in columns.items():
            batch = batch.append_column(name, values)
        return batch
'''
RECIPE = """
name: painted
pool: {path: pool.parquet}
run: out
unit_rows: 100
steps:
  - caption_length: {min_chars: 3, min_words: 1, max_chars: 2000000}
  - painter.paint
  - threshold: {column: shade, min: 0.5}
  - threshold: {column: depth, top_fraction: 0.8}
  - balance: {entries: entries.json, max_per_entry: 1000, keep_unmatched: true}
  - write_shards: {samples_per_shard: 100}
"""
HOSTILE = [
    "<script>alert(document.domain)</script>",
    '"><img src=x onerror="document.title=1">',
    "javascript:alert(1) [click](javascript:alert(1))",
    "\u202egnirts desrever\u2066 and an isolate",
    "</textarea></style></script><svg/onload=alert(1)>",
    "a very long text " * 60_000,
    "combining " + "\u0301" * 500,
    "null \u0000 and bell \u0007 and \ufffd",
]
"""Captions that try to become markup, to reorder the page or to fill it; a number follows each."""


def furnish(folder: Path) -> Path:
    """Writes the step, a recipe and two pools that share the rows 200 to 599."""
    (folder / "painter").mkdir()
    (folder / "painter" / "__init__.py").write_text("")
    (folder / "painter" / "paint.py").write_text(STEP)
    (folder / "entries.json").write_text('["red circle", "blue star"]')
    (folder / "r.yaml").write_text(RECIPE.replace("entries.json", str(folder / "entries.json")))
    for name, numbers in (("pool", range(600)), ("other", range(200, 700))):
        captions = [_caption(n).encode() for n in numbers]
        urls = [f"http://h{n % 5}.example/{n}?<b onmouseover=alert(1)>" for n in numbers]
        if name == "pool":  # one row more, which is dropped as `invalid_utf8`
            captions.append(b"not UTF-8: \xff\xc3<script>alert(1)</script> 600")
            urls.append("javascript:alert(document.domain)")
        text = pa.array(captions, pa.binary()).view(pa.string())
        pq.write_table(pa.table({"url": urls, "caption": text}), folder / f"{name}.parquet")
    return folder


def _caption(n: int) -> str:
    if 200 <= n < 200 + len(HOSTILE):
        return f"{HOSTILE[n - 200]} {n}"
    return f"{('a red circle', 'a blue star', 'no concept')[n % 3]} {n}"


def command(folder: Path, ray_address: str, *words: str) -> subprocess.Popen[str]:
    """Starts `pipeline.run` with these words, with one worker per pass unless overridden."""
    env = environment(folder, RAY_ADDRESS=ray_address)
    argv = [sys.executable, "-m", "pipeline.run", *words, *quick(words)]
    return subprocess.Popen(argv, cwd=folder, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def run(folder: Path, ray_address: str, *words: str) -> str:
    """Runs a command that must succeed. Returns its output."""
    done = command(folder, ray_address, *words)
    output, _ = done.communicate(timeout=HUNG)
    assert done.returncode == 0, output
    return output
