"""Any input of an evaluation gives a result or a one-line error that names the fault: no traceback, no partial file."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.trainer.labelled import labelled_members, write_folders
from tests.trainer.models import write_model
from tests.trainer.shards import jpeg, picture, samples, write_shards, write_tar
from trainer import export, moderate, search
from trainer.evaluate.__main__ import main as evaluate
from trainer.model import WEIGHTS_FILE
from trainer.samples import split_lines

POLICY = "neutral: [a photo]\nlabels: {red: {threshold: 0, prompts: [red]}}\n"
PICTURE = jpeg(picture("red", 0))


def place(at: Path, files: dict[str, str | bytes]) -> None:
    for name, data in files.items():
        path = at / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data.encode() if isinstance(data, str) else data)


@pytest.fixture
def at(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with `data` (two folders of classes) and lists of names."""
    monkeypatch.chdir(tmp_path)
    for colour in ("red", "blue"):
        (tmp_path / "data" / colour).mkdir(parents=True)
        for i in range(2):
            (tmp_path / "data" / colour / f"{i}.jpg").write_bytes(jpeg(picture(colour, i)))
    (tmp_path / "names.txt").write_text("red\nblue\n")
    (tmp_path / "labels.yaml").write_text("crime: [thief]\n")
    (tmp_path / "policy.yaml").write_text(POLICY)
    return tmp_path


CSV = "model,one,two\nx,0.5,0.4\ny,0.6,0.5\n"
RESULT = json.dumps({"dataset": "one", "model": "m", "metrics": {"acc1": 0.5}})
ROBUST = "robustness --data one.json --shift two=one.json --baselines b.csv"
BIAS = "bias --data p.csv --classnames names.txt --labels labels.yaml"
PROBE = "probe --data data --train train"

Make = Callable[[Path], object]


@pytest.mark.parametrize(
    ("words", "make", "message"),
    [
        # Folders of classes.
        ("zeroshot --data none", None, "none: no such folder"),
        ("zeroshot --data names.txt", None, "names.txt: not a folder"),
        ("zeroshot --data empty", lambda at: (at / "empty").mkdir(), "neither CLASS"),
        ("zeroshot --data data", lambda at: (at / "data" / "green").mkdir(), "data/green: it has no pictures"),
        ("zeroshot --data data", lambda at: place(at, {"data/red/x.bmp": b"BM"}),
         "data/red/x.bmp: pictures are read as"),
        ("zeroshot --data data", lambda at: place(at, {"data/red/x.jpg": b"<html>"}), "data/red/x.jpg: not a JPEG"),
        ("zeroshot --data data", lambda at: place(at, {"data/red/x.jpg": PICTURE[:400]}), "data/red/x.jpg: "),
        ("zeroshot --data data", lambda at: place(at, {"data/red/x.jpg": b""}), "data/red/x.jpg: not a JPEG"),
        ("zeroshot --data data", lambda at: os.symlink("gone", at / "data/red/x.jpg"), "x.jpg: No such file"),
        ("zeroshot --data data", lambda at: place(at, {"data/red/more/2.jpg": PICTURE}), "more/2.jpg: in a folder"),
        ("zeroshot --data data --classnames none", None, "none: no such file"),
        ("zeroshot --data data --classnames n", lambda at: place(at, {"n": ""}), "n: empty"),
        ("zeroshot --data data --classnames n", lambda at: place(at, {"n": "a\nb\nc"}), "3 class names for 2 folders"),
        ("zeroshot --data data --classnames n", lambda at: place(at, {"n": "caf\xe9\n".encode("latin-1")}),
         "n:1: not UTF-8"),
        ("zeroshot --data data --templates n", lambda at: place(at, {"n": "a photo"}), "expected {c}"),
        ("zeroshot --data data --templates n", lambda at: place(at, {"n": b"\xff\xfea\0"}), "n:1: not UTF-8"),
        ("zeroshot --data data --batch-size 0", None, "--batch-size"),
        ("zeroshot --data data --device tpu9", None, "device"),
        # CLIP_benchmark's layout.
        ("zeroshot --data wds", lambda at: write_tar(at / "wds/0.tar", labelled_members([0])), "no classnames.txt"),
        ("zeroshot --data wds --classnames names.txt", lambda at: write_tar(at / "wds/0.tar", []), "no images"),
        ("zeroshot --data wds --classnames names.txt", lambda at: place(at, {"wds/0.tar": b"x" * 600}),
         "wds/0.tar: no tar"),
        ("zeroshot --data wds --classnames names.txt",
         lambda at: place(at, {"wds/0.tar": write_tar(at / "t.tar", labelled_members([0])).read_bytes()[:1500]}),
         "wds/0.tar: cut at byte"),
        ("zeroshot --data wds --classnames names.txt",
         lambda at: write_tar(at / "wds/0.tar", [("a.jpg", PICTURE), ("b.cls", b"0")]), "has no image or no .cls"),
        ("zeroshot --data wds --classnames names.txt",
         lambda at: write_tar(at / "wds/0.tar", [("a.cls", b"0"), ("a.v2.jpg", PICTURE)]), "it has .cls, .v2.jpg"),
        ("zeroshot --data wds --classnames names.txt",
         lambda at: (write_tar(at / "wds/0.tar", labelled_members([0])), place(at, {"wds/nshards.txt": "many"})),
         "expected the number of shards"),
        ("zeroshot --data wds --classnames names.txt",
         lambda at: (write_tar(at / "wds/0.tar", labelled_members([0])), place(at, {"wds/nshards.txt": "-1"})),
         "found -1, expected the number of shards"),
        ("zeroshot --data wds --classnames names.txt",
         lambda at: (write_tar(at / "wds/0.tar", labelled_members([0])), place(at, {"wds/nshards.txt": "9" * 15})),
         "wds/1.tar: missing"),
        ("zeroshot --data wds --classnames n",
         lambda at: (write_tar(at / "wds/0.tar", labelled_members([0])), place(at, {"n": "red\n\nblue\n"})),
         "n:2: an empty line; expected the name of class 1"),
        # Retrieval.
        ("retrieval --data none", None, "none is not a folder"),
        ("retrieval --data empty", lambda at: (at / "empty").mkdir(), "an empty folder"),
        ("retrieval --data wds", lambda at: place(at, {"wds/dataset_type.txt": "retrieval"}), "no *.tar with"),
        ("retrieval --data wds", lambda at: (place(at, {"wds/dataset_type.txt": "retrieval"}),
         write_tar(at / "wds/0.tar", [("a.jpg", PICTURE), ("a.txt", b" \n")])), "wds/0.tar:a: no caption"),
        ("retrieval --data wds", lambda at: (place(at, {"wds/dataset_type.txt": "retrieval"}),
         write_tar(at / "wds/0.tar", [("a.jpg", PICTURE), ("a.txt", b"caf\xe9")])), "not UTF-8"),
        ("retrieval --data shards", lambda at: write_shards(at / "shards", [(b"<html>", "x")]),
         "00000.tar:000000000: not"),
        # Classifiers on features.
        (PROBE, None, "train: no such folder"),
        (PROBE, lambda at: write_folders(at / "train", 1), "its classes are not those of"),
        ("probe --data data --train data", None, "both for fitting and for testing"),
        (PROBE, lambda at: place(at, {"train/red/0.jpg": PICTURE, "train/blue/0.jpg": PICTURE}),
         "give --l2 or --val"),
        (PROBE + " --l2 nan", None, "--l2: found nan"),
        (PROBE + " --seed -1", None, "--seed: found -1"),
        (PROBE + " --seed 99999999999999999999", None, "--seed: found"),
        (PROBE + " --max-iterations 0", None, "--max-iterations"),
        ("fewshot --data data --train train --shots 2",
         lambda at: place(at, {"train/red/0.jpg": PICTURE, "train/blue/0.jpg": PICTURE}), "fewer than --shots 2"),
        ("fewshot --data data --train train --shots 0", None, "--shots"),
        # Robustness.
        (ROBUST, lambda at: place(at, {"b.csv": CSV}), "one.json: No such file"),
        (ROBUST, lambda at: place(at, {"b.csv": "", "one.json": RESULT}), "b.csv: no rows"),
        (ROBUST, lambda at: place(at, {"b.csv": "model,one\n", "one.json": RESULT}), "b.csv: no rows"),
        (ROBUST, lambda at: place(at, {"b.csv": CSV + "z,0.7\n", "one.json": RESULT}),
         "b.csv:4: 2 values for the 3 columns"),
        (ROBUST, lambda at: place(at, {"b.csv": CSV + "z,0.7,1,1\n", "one.json": RESULT}), "b.csv:4: 4 values"),
        (ROBUST, lambda at: place(at, {"b.csv": CSV + "x,0.7,0.6\n", "one.json": RESULT}),
         "two rows for the model 'x'"),
        (ROBUST, lambda at: place(at, {"b.csv": CSV.replace(",", ";"), "one.json": RESULT}), "separated by commas"),
        (ROBUST, lambda at: place(at, {"b.csv": CSV + "z,60%,0.5\n", "one.json": RESULT}), "z: could not convert"),
        (ROBUST, lambda at: place(at, {"b.csv": CSV + "z,nan,0.5\n", "one.json": RESULT}), "between 0 and 1"),
        (ROBUST, lambda at: place(at, {"b.csv": b"model,caf\xe9\n", "one.json": RESULT}), "b.csv:1: not UTF-8"),
        (ROBUST, lambda at: place(at, {"b.csv": CSV.replace("one", "two"), "one.json": RESULT}), "distinct column"),
        (ROBUST, lambda at: place(at, {"b.csv": "model,a\nx,1\n", "one.json": RESULT}), "expected two or more"),
        (ROBUST, lambda at: place(at, {"b.csv": CSV, "one.json": "[]"}), "one.json: expected the JSON of"),
        (ROBUST, lambda at: place(at, {"b.csv": CSV, "one.json": RESULT.replace("0.5", "NaN")}), "acc1 is nan"),
        (ROBUST, lambda at: place(at, {"b.csv": CSV, "one.json": "["}), "one.json: not JSON"),
        (ROBUST.replace("b.csv", "b.json"), lambda at: place(at, {"b.json": "{}", "one.json": RESULT}), "JSON list"),
        (ROBUST.replace("b.csv", "b.json"), lambda at: place(at, {"b.json": "[1]", "one.json": RESULT}), "JSON list"),
        # Overlap.
        ("overlap --data data --train none", None, "none is not a folder"),
        ("overlap --data data --train emb --by embedding", lambda at: embeddings(at, np.ones((2, 9))), "shape (2, 9)"),
        ("overlap --data data --train emb --by embedding", lambda at: embeddings(at, np.ones((3, 64))),
         "shape (3, 64)"),
        ("overlap --data data --train emb --by embedding", lambda at: embeddings(at, np.full((2, 64), np.nan)),
         "row 0: the"),
        ("overlap --data data --train emb --by embedding", lambda at: embeddings(at, b"x"), "expected a .npy file"),
        ("overlap --data data --train emb --by embedding",
         lambda at: (embeddings(at, np.ones((2, 64))), (at / "emb/metadata/metadata_0.parquet").unlink()),
         "metadata_0"),
        ("overlap --data data --train shards", lambda at: (write_shards(at / "shards", samples(2)),
         place(at, {"shards/00000.parquet": b"PAR1"})), "00000.parquet: "),
        ("overlap --data data --train data --max-hamming 99", None, "--max-hamming"),
        ("overlap --data data --train data --min-cosine nan", None, "--min-cosine"),
        # Bias.
        (BIAS, None, "p.csv: No such file"),
        (BIAS, lambda at: place(at, {"p.csv": "image,g\n"}), "p.csv: no rows"),
        (BIAS, lambda at: place(at, {"p.csv": "image,g\ndata/red/0.jpg,a\ndata/red/1.jpg\n"}), "p.csv:3: 1 values"),
        (BIAS, lambda at: place(at, {"p.csv": "file,g\ndata/red/0.jpg,a\n"}), "its columns are file, g"),
        (BIAS, lambda at: place(at, {"p.csv": "image,g\ngone.jpg,a\n"}), "gone.jpg: No such file"),
        (BIAS, lambda at: place(at, {"p.csv": "image,g\nnames.txt,a\n"}), "names.txt: not a JPEG"),
        (BIAS, lambda at: place(at, {"p.csv": b"image,g\nx.jpg,caf\xe9\n"}), "p.csv:2: not UTF-8"),
        (BIAS, lambda at: place(at, {"p.csv": 'image,g\n"x.jpg,a\n'}), "p.csv:"),
        (BIAS.replace("p.csv", "empty"), lambda at: (at / "empty").mkdir(), "no GROUP/*.jpg"),
        (BIAS.replace("labels.yaml", "none.yaml"), lambda at: place(at, {"p.csv": "image,g\nx,a\n"}),
         "none.yaml: No such"),
        (BIAS.replace("labels.yaml", "l.yaml"), lambda at: place(at, {"l.yaml": "a: [1]"}), "expected categories"),
        (BIAS.replace("labels.yaml", "l.yaml"), lambda at: place(at, {"l.yaml": ""}), "expected categories"),
    ],
)  # fmt: skip
def test_an_evaluation_ends_in_a_line(
    model: str, at: Path, capsys: pytest.CaptureFixture[str], words: str, make: Make | None, message: str
) -> None:
    if make:
        make(at)
    task, *rest = words.split()
    assert evaluate([task, "--model", model, *rest]) == 2
    printed = capsys.readouterr()
    assert message in printed.err
    assert printed.out == ""


def embeddings(at: Path, vectors: np.ndarray | bytes) -> None:
    place(at, {"emb/img_emb/img_emb_0.npy": b"" if isinstance(vectors, np.ndarray) else vectors})
    if isinstance(vectors, np.ndarray):
        np.save(at / "emb/img_emb/img_emb_0.npy", vectors.astype(np.float16))
    (at / "emb/metadata").mkdir()
    table = pa.table({"image_path": ["a", "b"], "caption": ["a", "b"]})
    pq.write_table(table, at / "emb/metadata/metadata_0.parquet")


@pytest.mark.parametrize(
    ("words", "make"),
    [
        ("zeroshot --data data --classnames n", lambda at: place(at, {"n": "\ufeffred\r\nblue\r\n"})),
        ("zeroshot --data data",
         lambda at: place(at, {"data/red/.hidden.jpg": b"x", "data/red/Thumbs.db": b"x"})),
        ("zeroshot --data one", lambda at: place(at, {"one/red/0.JPG": PICTURE})),
        ("retrieval --data shards", lambda at: write_shards(at / "shards", samples(1))),
        (ROBUST, lambda at: place(at, {"b.csv": "\ufeff" + CSV.replace("\n", "\r\n") + "\r\n", "one.json": RESULT})),
        (ROBUST, lambda at: place(at, {"b.csv": CSV, "one.json": "\ufeff" + RESULT.replace("0.5", "1.0")})),
        (BIAS, lambda at: place(at, {"p.csv": "\ufeffimage,g\ndata/red/0.jpg,a\n\n"})),
        ("overlap --data data --train shards", lambda at: write_shards(at / "shards", samples(1))),
        ("probe --data data --train train --l2 1",
         lambda at: place(at, {"train/red/0.jpg": PICTURE, "train/blue/0.jpg": PICTURE})),
        ("fewshot --data data --train train --shots 1",
         lambda at: place(at, {"train/red/0.jpg": PICTURE, "train/blue/0.jpg": PICTURE})),
    ],
)  # fmt: skip
def test_harmless_oddities_are_accepted(
    model: str, at: Path, capsys: pytest.CaptureFixture[str], words: str, make: Make
) -> None:
    make(at)
    task, *rest = words.split()
    assert evaluate([task, "--model", model, *rest]) == 0, capsys.readouterr().err
    assert json.loads(capsys.readouterr().out)["metrics"]


@pytest.mark.parametrize(
    ("main", "words", "make", "message"),
    [
        (moderate.main, "none --policy policy.yaml", None, "none is not a folder"),
        (moderate.main, "empty --policy policy.yaml", lambda at: (at / "empty").mkdir(), "expected shards, a picture"),
        (moderate.main, "data --policy none.yaml", None, "none.yaml: No such file"),
        (moderate.main, "data --policy p.yaml", lambda at: place(at, {"p.yaml": b"\xff\xfe"}),
         "not a text file in UTF-8"),
        (moderate.main, "data --policy policy.yaml", lambda at: place(at, {"data/x.heic": b"x"}),
         "x.heic: pictures are read"),
        (search.main, "embed none --out o", None, "none is not a folder"),
        (search.main, "index none --out o", None, "none: no such folder"),
        (search.main, "index emb", lambda at: embeddings(at, np.full((2, 64), np.inf)),
         "img_emb_0.npy: row 0: the features"),
        (search.main, "index emb", lambda at: embeddings(at, np.ones(64)), "expected floats of shape"),
        (search.main, "index emb", lambda at: embeddings(at, b"x"), "expected a .npy file"),
        (search.main, "query none --text x", None, "image.index: missing"),
        (search.main, "query data --text x", lambda at: place(at, {"data/image.index": b"xxxx"}),
         "not a faiss index"),
        (search.main, "query emb --text x", lambda at: indexed(at, 9), "vectors of 64 dimensions, but the index has 9"),
        (search.main, "query emb --image none.jpg", lambda at: indexed(at, 64), "none.jpg: No such file"),
        (search.main, "query emb --image names.txt", lambda at: indexed(at, 64), "names.txt: not a JPEG"),
        (search.main, "query emb --text x", lambda at: (indexed(at, 64), spoil_size(at)), "not a faiss index"),
        (search.main, "query emb --text x -k 0", lambda at: indexed(at, 64), "-k: found 0"),
    ],
)  # fmt: skip
def test_search_and_moderation_end_in_a_line(
    model: str,
    at: Path,
    capsys: pytest.CaptureFixture[str],
    main: Callable[[list[str]], int],
    words: str,
    make: Make | None,
    message: str,
) -> None:
    if make:
        make(at)
    assert main([*words.split(), "--model", model]) == 2
    printed = capsys.readouterr()
    assert message in printed.err
    assert printed.out == ""


def indexed(at: Path, dim: int) -> None:
    vectors = np.eye(2, dim)
    embeddings(at, vectors)
    search.build([at / "emb/img_emb/img_emb_0.npy"], at / "emb/image.index", None)


def spoil_size(at: Path) -> None:
    """Makes the index claim more vectors than fit in memory."""
    index = at / "emb/image.index"
    data = bytearray(index.read_bytes())
    data[12:16] = b"\xff\xff\xff\x0f"  # dimension, metric and number of vectors come first
    index.write_bytes(data)


@pytest.mark.parametrize(
    "settings", ["[]", "{", '{"model": null, "pretrained": null, "precision": "fp32"}', '{"model": "m"}']
)
def test_damaged_settings_of_a_search_are_named(at: Path, capsys: pytest.CaptureFixture[str], settings: str) -> None:
    indexed(at, 64)
    place(at, {"emb/search.json": settings})
    assert search.main(["query", "emb", "--text", "x"]) == 2
    assert "search.json: missing or damaged" in capsys.readouterr().err


def test_metadata_of_other_tools_is_printed_as_json(model: str, at: Path, capsys: pytest.CaptureFixture[str]) -> None:
    indexed(at, 64)
    columns = {"image_path": ["a", "b"], "taken": [datetime(2026, 1, 31)] * 2, "raw": [b"\xff"] * 2}
    pq.write_table(pa.table({**columns, "score_of_it": [float("nan")] * 2}), at / "emb/metadata/metadata_0.parquet")
    assert search.main(["query", "emb", "--text", "x", "-k", "1", "--model", model]) == 0
    found = json.loads(capsys.readouterr().out, parse_constant=pytest.fail)
    assert found["taken"] == "2026-01-31 00:00:00"
    assert found["score_of_it"] is None


def test_file_names_that_are_not_utf8_are_moderated(model: str, at: Path) -> None:
    path = os.fsencode(at) + b"/odd/caf\xe9.jpg"
    (at / "odd").mkdir()
    with open(path, "wb") as file:
        file.write(PICTURE)
    assert moderate.main(["odd", "--policy", "policy.yaml", "--output", "out.jsonl", "--model", model]) == 0
    assert os.fsencode(json.loads((at / "out.jsonl").read_text())["image"]) == b"odd/caf\xe9.jpg"


def test_pictures_in_hidden_folders_are_not_moderated(model: str, at: Path) -> None:
    place(at, {"data/.thumbnails/0.jpg": PICTURE, "data/red/.cache/0.jpg": PICTURE})
    assert moderate.main(["data", "--policy", "policy.yaml", "--output", "out.jsonl", "--model", model]) == 0
    assert len((at / "out.jsonl").read_text().splitlines()) == 4


def test_a_result_written_to_a_device_does_not_replace_it(model: str, at: Path) -> None:
    """Root could replace the device with a file."""
    os.mkfifo(at / "pipe")
    with ThreadPoolExecutor() as pool:
        read = pool.submit((at / "pipe").read_text)
        assert evaluate(["zeroshot", "--model", model, "--data", "data", "--output", "pipe"]) == 0
        assert json.loads(read.result())["task"] == "zeroshot_classification"
    assert (at / "pipe").is_fifo()


def test_classes_with_the_same_name_cause_a_warning(model: str, at: Path, capsys: pytest.CaptureFixture[str]) -> None:
    place(at, {"n": "red\nred\n"})
    assert evaluate(["zeroshot", "--model", model, "--data", "data", "--classnames", "n"]) == 0
    assert "2 classes are called 'red'" in capsys.readouterr().err


def test_captions_are_split_only_at_line_ends() -> None:
    assert split_lines(" one\u2028still one\x0c \r\n\ntwo\rthree") == ["one\u2028still one", "two", "three"]


def test_a_query_for_more_results_than_exist_finds_all(
    model: str, at: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    indexed(at, 64)
    assert search.main(["query", "emb", "--text", "x", "-k", "1000000000", "--model", model]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 2


def test_a_failed_moderation_leaves_no_partial_file(model: str, at: Path) -> None:
    place(at, {"data/z.jpg": PICTURE})
    words = ["data", "--policy", "policy.yaml", "--output", "out.jsonl", "--model"]
    assert moderate.main([*words, spoilt(model, at / "spoilt", 1e9)]) == 2
    assert not list(at.glob("*out.jsonl*"))
    assert moderate.main([*words, model]) == 0
    assert len((at / "out.jsonl").read_text().splitlines()) == 5
    assert not list(at.glob(".out.jsonl*"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda at: (at / "x.pt").write_bytes(b"no checkpoint"), "x.pt: damaged, or not a checkpoint of this trainer"),
        (lambda at: torch.save({"model": {}, "model_config": {}, "step": 1}, at / "x.pt"), "no config in it"),
        (lambda at: (at / "x.pt").mkdir(), "no checkpoints/step-*.pt"),
        (lambda at: None, "x.pt: no such checkpoint"),
    ],
)
def test_an_export_of_something_else_than_a_checkpoint_is_refused(
    at: Path, capsys: pytest.CaptureFixture[str], change: Make, message: str
) -> None:
    change(at)
    assert export.main(["x.pt", "out"]) == 2
    assert message in capsys.readouterr().err
    assert not (at / "out").exists()


# --- Features that are not numbers ------------------------------------------------------------------------------------


def spoilt(model: str, out: Path, factor: float) -> str:
    """The model with image features scaled by `factor`, or NaN from 1e6 on."""
    write_model(out)
    state = load_file(Path(model) / WEIGHTS_FILE)
    projection = next(name for name in state if name.endswith(("visual.proj", "visual.head.proj.weight")))
    state[projection] = state[projection] * factor if factor < 1e6 else torch.full_like(state[projection], torch.nan)
    save_file(
        {name: value.contiguous() for name, value in state.items()}, out / WEIGHTS_FILE, metadata={"format": "pt"}
    )
    return str(out)


TASKS: dict[str, Any] = {
    "zeroshot": "--data data",
    "retrieval": "--data shards",
    "probe": "--data data --train train --features embedding",
    "fewshot": "--data data --train train --features embedding --shots 1",
    "robustness": "--data one=data --shift two=data --baselines b.csv",
    "overlap": "--data data --train shards --by embedding",
    "bias": "--data data --classnames names.txt --labels labels.yaml",
}


@pytest.mark.parametrize("factor", [1e9, 1e-9], ids=["nan", "zero"])
@pytest.mark.parametrize("task", [*TASKS, "moderate", "embed"])
def test_features_that_are_not_unit_vectors_are_an_error(
    model: str, at: Path, capsys: pytest.CaptureFixture[str], task: str, factor: float
) -> None:
    """Overflow gives NaN. In fp16, a norm that overflows or underflows gives vectors of zeros."""
    write_shards(at / "shards", samples(4))
    place(at, {"b.csv": CSV, "train/red/0.jpg": PICTURE, "train/blue/0.jpg": PICTURE, "train/blue/1.jpg": PICTURE})
    words = ["--model", spoilt(model, at / "spoilt", factor), "--precision", "fp16"]
    if task == "moderate":
        assert moderate.main(["data", "--policy", "policy.yaml", *words]) == 2
    elif task == "embed":
        assert search.main(["embed", "shards", "--out", "o", *words]) == 2
        assert not list((at / "o").glob("*/*"))
    else:
        assert evaluate([task, *TASKS[task].split(), *words]) == 2
    printed = capsys.readouterr()
    assert "the features are" in printed.err
    assert printed.out == ""
