"""Reads the output of a run with packages that are not dependencies, installed from the package index.

Packages with conflicting pins get their own environment. Of two that cannot be installed, only the
files are fetched.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import venv
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import ROOT
from tests.stages import finished
from tests.stages.test_write_shards import expected_captions, snippet

pytestmark = pytest.mark.slow

PACKAGES = ["datasets>=5,<6", "mlcroissant>=1.1,<2", "duckdb>=2,<3", "polars>=2,<3", "orjson", "pysimdjson", "pillow"]
Ask = Callable[[str, Path], Any]


@pytest.fixture(scope="module", params=["JPEG", "JPEG PNG WEBP"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return finished.write(tmp_path_factory.mktemp("run") / "shards", tuple(request.param.split()))


@pytest.fixture(scope="module")
def ask(tmp_path_factory: pytest.TempPathFactory) -> Ask:
    """Runs code in the folder of a dataset, in an environment with PACKAGES. Returns its variable `answer`."""
    home = tmp_path_factory.mktemp("readers")
    venv.create(home / "venv", with_pip=True)
    python = home / "venv" / "bin" / "python"
    subprocess.run([python, "-m", "pip", "install", "-q", *PACKAGES], check=True)
    environment = {
        **os.environ,
        "HOME": str(home),
        "HF_HOME": str(home / "hf"),
        "HF_HUB_OFFLINE": "1",
        "PYTHONPATH": "",
    }

    def answer(code: str, folder: Path) -> Any:
        code += "\nimport json; print('\\n' + json.dumps(answer))"
        done = subprocess.run(
            [python, "-c", code], cwd=folder, env=environment, capture_output=True, text=True, timeout=300
        )
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout.splitlines()[-1])

    return answer


@pytest.fixture(scope="module")
def fetched(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """`fetched("name==1.0")`: the folder with the files of a package, without its dependencies."""

    def fetch(package: str) -> Path:
        target = tmp_path_factory.mktemp("package")
        subprocess.run([sys.executable, "-m", "pip", "install", "-q", "--no-deps", "-t", target, package], check=True)
        return target

    return fetch


@pytest.mark.parametrize("package", ["duckdb", "polars", "mlcroissant", "os"])
def test_the_snippets_of_the_card_run(ask: Ask, folder: Path, package: str) -> None:
    code = snippet(folder, package)
    assert ask(f"{code}\nanswer = True", folder)


def test_datasets_loads_the_folder_with_its_pictures(ask: Ask, folder: Path) -> None:
    found = ask(
        """
import os, datasets
rows = datasets.load_dataset(os.getcwd(), split="train")
pictures = [name for name, feature in rows.features.items() if isinstance(feature, datasets.Image)]
answer = [
    [row["txt"], [row[name].size for name in pictures if row[name]], row["json"]["late"], row["json"]["phash"]]
    for row in rows
]
""",
        folder,
    )
    rows = finished.rows().to_pylist()
    assert found == [
        [row["caption"], [[32 + i, 24]], row["late"], row["phash"] and f"{row['phash']:016x}"]
        for i, row in enumerate(rows)
    ]


def test_datasets_loads_the_tars_and_the_tables_by_name(ask: Ask, tmp_path: Path) -> None:
    # Without the card it infers the types of the tars from five samples, so each column needs a value by then.
    found = ask(
        """
import datasets, glob
kinds = {"webdataset": glob.glob("00000.tar"), "parquet": sorted(glob.glob("*.parquet"))}
sets = {kind: datasets.load_dataset(kind, data_files=files, split="train") for kind, files in kinds.items()}
table = sets["parquet"]
answer = [
    [len(rows) for rows in sets.values()], sets["webdataset"][0]["json"]["phash"], table["phash"][0],
    str(table.features["vector"]), str(table.features["phash"]),
]
""",
        finished.write(tmp_path / "shards"),
    )
    assert found == [
        [finished.PER_SHARD, finished.SAMPLES], f"{2**63:016x}", 2**63,
        "List(Value('float16'), length=4)", "Value('uint64')",
    ]  # fmt: skip


def test_mlcroissant_validates_and_reads_every_record(ask: Ask, folder: Path) -> None:
    warnings, records = ask(
        """
import mlcroissant
dataset = mlcroissant.Dataset("croissant.json")
issues = dataset.metadata.ctx.issues
records = [
    [r["samples/caption"].decode(), r["samples/phash"], r["samples/flag"], len(r["samples/vector"]),
     r["samples/day"] and str(r["samples/day"].date())]
    for r in dataset.records("samples")
]
answer = [[str(w) for w in (*issues.errors, *issues.warnings)], records]
""",
        folder,
    )
    assert [w for w in warnings if "datePublished" not in w] == []  # known only to the publisher
    rows = finished.rows().to_pylist()
    assert [r[0] for r in records] == [row["caption"] for row in rows]
    assert [r[2:] for r in records] == [[row["flag"], 4, row["day"] and str(row["day"])] for row in rows]


def test_duckdb_and_polars_agree_on_the_tables(ask: Ask, folder: Path) -> None:
    by_duckdb, by_polars, columns = ask(
        """
import duckdb, polars
columns = "caption, phash, serial, big, vector, late, price::varchar as price"
by_duckdb = duckdb.sql(f"select {columns} from '*.parquet' order by key").fetchall()
frame = polars.read_parquet("*.parquet").sort("key")
by_polars = frame.select("caption", "phash", "serial", "big", "vector", "late", polars.col("price").cast(str)).rows()
answer = [by_duckdb, by_polars, len(frame.columns)]
""",
        folder,
    )
    assert by_duckdb == by_polars
    rows = finished.rows().to_pylist()
    assert [row[:4] for row in by_duckdb] == [[r["caption"], r["phash"], r["serial"], r["big"]] for r in rows]
    assert columns == len(finished.TYPES)  # `key` in place of `image`


def test_strict_json_parsers_read_every_sample(ask: Ask, folder: Path) -> None:
    # DataComp's resharder reads the uid with simdjson.
    found = ask(
        """
import glob, orjson, simdjson, tarfile
texts = []
for path in sorted(glob.glob("*.tar")):
    with tarfile.open(path) as tar:
        texts += [tar.extractfile(m).read() for m in tar if m.name.endswith(".json")]
answer = [[simdjson.Parser().parse(text)["uid"] for text in texts], [orjson.loads(text)["uid"] for text in texts]]
""",
        folder,
    )
    assert found == [finished.rows()["uid"].to_pylist()] * 2


def run_here(code: str, folder: Path, *path: Path) -> list[str]:
    """Runs code in our environment, with the packages of `path` before ours. Returns the lines it prints."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, (*path, ROOT)))}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code], cwd=folder, env=environment, capture_output=True, text=True,
        timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_open_clip_train_reads_every_sample(fetched: Callable[[str], Path], folder: Path) -> None:
    # It uses webdataset internals of 0.2.86, the newest version that it allows.
    lines = run_here(
        """
import argparse, json
import numpy, torch
from trainer.model import open_clip
from open_clip_train.data import get_wds_dataset
args = argparse.Namespace(
    train_data="{00000..00002}.tar", val_data=None, train_num_samples=None, train_data_upsampling_factors=None,
    dataset_resampled=False, seed=0, workers=1, world_size=1, batch_size=5,
)
shape = lambda image: torch.from_numpy(numpy.asarray(image.resize((8, 8))))
loader = get_wds_dataset(args, shape, is_train=True, tokenizer=lambda text: [text]).dataloader
print(json.dumps([loader.num_samples, sorted(caption for _, captions in loader for caption in captions)]))
""",
        folder,
        fetched("webdataset==0.2.86"),
    )
    assert json.loads(lines[-1]) == [finished.SAMPLES, sorted(expected_captions())]


def test_clip_retrieval_reads_every_sample(fetched: Callable[[str], Path], tmp_path: Path) -> None:
    # Only its reader: importing the package imports servers and models.
    reader = fetched("clip-retrieval==2.45.0") / "clip_retrieval" / "clip_inference" / "reader.py"
    lines = run_here(
        f"""
import importlib.util, json
import numpy, torch
spec = importlib.util.spec_from_file_location("reader", {str(reader)!r})
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
shape = lambda image: torch.from_numpy(numpy.asarray(image.resize((8, 8))))
tars = [f"{{i:05d}}.tar" for i in range(3)]
batches = module.WebdatasetReader(
    lambda urls: urls, shape, lambda texts: [len(texts[0])], tars, batch_size=4, num_prepro_workers=0,
    enable_metadata=True,
)
print(json.dumps([[text, json.loads(about)["key"]] for b in batches for text, about in zip(b["text"], b["metadata"])]))
""",
        finished.write(tmp_path / "shards"),
    )
    keys = [f"{shard}{row:01d}".zfill(9) for shard in range(3) for row in range(finished.PER_SHARD)]
    assert json.loads(lines[-1]) == [list(pair) for pair in zip(expected_captions(), keys)]
