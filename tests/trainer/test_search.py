from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from tests.trainer.labelled import texture
from tests.trainer.shards import jpeg, samples, write_shards
from trainer.features import Encoder
from trainer.samples import Sample
from trainer.search import main


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    pairs = samples(11)
    pairs[6] = (b"<html>", "no picture")
    return write_shards(tmp_path / "shards", pairs, per_shard=4)


def embedded(model: str, shards: Path, out: Path, *words: str, command: str = "embed") -> Path:
    assert main([command, str(shards), "--model", model, "--out", str(out), "--part", "4", *words]) == 0
    return out


def test_embeddings_are_in_clip_retrievals_layout(
    model: str, shards: Path, tmp_path: Path, encoder: Encoder, capsys: pytest.CaptureFixture[str]
) -> None:
    out = embedded(model, shards, tmp_path / "out")
    assert "00001.tar:000000006: not a JPEG" in capsys.readouterr().err
    assert sorted(path.relative_to(out).as_posix() for path in out.rglob("*") if path.is_file()) == [
        *(f"img_emb/img_emb_{part}.npy" for part in range(3)),
        *(f"metadata/metadata_{part}.parquet" for part in range(3)),
        "search.json",
        *(f"text_emb/text_emb_{part}.npy" for part in range(3)),
    ]
    images = [np.load(out / f"img_emb/img_emb_{part}.npy") for part in range(3)]
    texts = [np.load(out / f"text_emb/text_emb_{part}.npy") for part in range(3)]
    rows = [pq.read_table(out / f"metadata/metadata_{part}.parquet").to_pylist() for part in range(3)]
    assert [len(part) for part in images] == [len(part) for part in texts] == [len(part) for part in rows] == [4, 3, 3]
    assert images[0].dtype == texts[0].dtype == np.float16
    assert rows[1][2] == {"image_path": "00001.tar:000000007", "caption": "a white picture"}
    ((_, want),) = encoder.images([Sample("7", samples(8)[7][0])])
    assert np.allclose(images[1][2], want.numpy()[0], atol=2e-3)
    assert np.allclose(texts[1][2], encoder.texts(["a white picture"]).numpy()[0], atol=2e-3)


def test_embedding_resumes_where_it_stopped(model: str, shards: Path, tmp_path: Path) -> None:
    out = embedded(model, shards, tmp_path / "out")
    whole = np.load(out / "img_emb/img_emb_1.npy")
    kept = (out / "img_emb/img_emb_0.npy").stat().st_mtime_ns
    (out / "metadata/metadata_1.parquet").unlink()
    (out / "img_emb/img_emb_1.npy").write_bytes(b"cut")
    embedded(model, shards, out)
    assert (out / "img_emb/img_emb_0.npy").stat().st_mtime_ns == kept
    assert np.array_equal(np.load(out / "img_emb/img_emb_1.npy"), whole)


def test_embeddings_of_other_data_or_models_are_not_mixed(
    model: str, shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = embedded(model, shards, tmp_path / "out")
    other = write_shards(tmp_path / "other", samples(11))
    assert main(["embed", str(other), "--model", model, "--out", str(out), "--part", "4"]) == 2
    assert "give another --out" in capsys.readouterr().err


def ask(capsys: pytest.CaptureFixture[str], *words: str) -> list[dict[str, Any]]:
    capsys.readouterr()
    assert main(["query", *words]) == 0
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def test_search_by_image_and_by_text(
    model: str, shards: Path, tmp_path: Path, encoder: Encoder, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("faiss")
    out = str(embedded(model, shards, tmp_path / "out", command="index"))
    file = tmp_path / "query.jpg"
    file.write_bytes(samples(8)[7][0])
    found = ask(capsys, out, "--image", str(file), "-k", "3")
    assert found[0] == {
        "score": pytest.approx(1, abs=2e-3),
        "image_path": "00001.tar:000000007",
        "caption": "a white picture",
    }
    assert [hit["score"] for hit in found] == sorted((hit["score"] for hit in found), reverse=True)
    # What a text finds is what comparing it with every embedding finds.
    vectors = np.concatenate([np.load(path) for path in sorted((tmp_path / "out/img_emb").glob("*.npy"))])
    rows = [row for path in sorted((tmp_path / "out/metadata").glob("*")) for row in pq.read_table(path).to_pylist()]
    scores = vectors.astype(np.float32) @ encoder.texts(["a blue picture"]).numpy()[0]
    found = ask(capsys, out, "--text", "a blue picture", "-k", "4")
    assert [hit["image_path"] for hit in found] == [rows[i]["image_path"] for i in np.argsort(-scores)[:4]]
    # A caption is nearest to itself.
    captions = ask(capsys, out, "--text", "a green picture", "--captions", "-k", "1")
    assert captions[0]["caption"] == "a green picture"
    assert len(ask(capsys, out, "--text", "x", "-k", "99")) == 10


def test_inverted_lists_find_the_nearest(model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("faiss")
    pairs = [(jpeg(texture(i)), f"number {i}") for i in range(160)]
    out = str(embedded(model, write_shards(tmp_path / "s", pairs), tmp_path / "out", "--part", "100", command="index"))
    file = tmp_path / "query.jpg"
    file.write_bytes(pairs[133][0])
    exact = ask(capsys, out, "--image", str(file), "-k", "5")
    assert main(["index", out, "--lists", "4"]) == 0
    assert ask(capsys, out, "--image", str(file), "-k", "5", "--probes", "4") == exact
    assert exact[0]["caption"] == "number 133"
    assert main(["index", out, "--lists", "500"]) == 2


def test_missing_inputs_and_packages_are_reported(
    model: str, shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("faiss")
    out = embedded(model, shards, tmp_path / "out")
    assert main(["query", str(out), "--text", "x"]) == 2
    assert "trainer.search index" in capsys.readouterr().err
    assert main(["index", str(shards)]) == 2
    assert "--model and --out" in capsys.readouterr().err
    assert main(["index", str(out)]) == 0
    (out / "metadata/metadata_2.parquet").unlink()
    assert main(["query", str(out), "--text", "x"]) == 2
    assert "build it again" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "faiss", None)
    assert main(["index", str(out)]) == 2
    assert "winnow-clip[search]" in capsys.readouterr().err
