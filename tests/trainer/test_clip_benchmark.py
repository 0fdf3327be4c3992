"""Our metrics equal those of CLIP_benchmark's own functions on the same model and data.

It needs packages that nothing else here needs, so these tests install it from the package index.
"""

from __future__ import annotations

import importlib
import io
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from tests.trainer.labelled import texture, write_folders
from tests.trainer.shards import COLOURS, jpeg, write_tar
from trainer.evaluate.classes import open_labelled, read_templates
from trainer.model import open_clip

pytestmark = pytest.mark.slow

# Without what its other tasks depend on (transformers, pycocoevalcap and Java).
PACKAGES = ["clip_benchmark==1.6.2", "scikit-learn<2", "joblib", "threadpoolctl", "narwhals"]


@pytest.fixture(scope="module")
def peer(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], ModuleType]:
    folder = str(tmp_path_factory.mktemp("clip_benchmark"))
    subprocess.run([sys.executable, "-m", "pip", "install", "-q", "--no-deps", "-t", folder, *PACKAGES], check=True)
    sys.path.append(folder)  # what is installed here comes first
    return lambda metric: importlib.import_module(f"clip_benchmark.metrics.{metric}")


@pytest.fixture
def theirs(model: str) -> tuple[Any, Callable[[Image.Image], torch.Tensor], Any]:
    """open_clip's model, preprocessing and tokenizer, as CLIP_benchmark loads them."""
    net, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{model}")
    return net.eval(), preprocess, open_clip.get_tokenizer(f"local-dir:{model}")


class Labelled(list[tuple[torch.Tensor, int]]):
    classes: list[str]


def test_zero_shot(peer, theirs, evaluate, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:  # type: ignore[no-untyped-def]
    metric = peer("zeroshot_classification")
    # It converts one-element arrays to float, which NumPy no longer allows.
    monkeypatch.setattr(metric, "float", lambda array: array.item(), raising=False)
    root = write_folders(tmp_path / "data", 15)
    for name in ("striped", "dotted"):  # acc5 wants five classes or more; these are larger
        (root / name).mkdir()
        for i in range(25):
            texture(i, size=40 + 3 * i).save(root / name / f"{i}.png")
    got = evaluate("zeroshot", "--data", root, "--templates", "imagenet", "--batch-size", 16)
    net, preprocess, tokenizer = theirs
    data = open_labelled(root)
    pairs = Labelled((preprocess(Image.open(io.BytesIO(sample.encoded))), sample.label) for sample in data)
    pairs.classes = data.names
    want = metric.evaluate(
        net, DataLoader(pairs, batch_size=32), tokenizer, data.names, read_templates("imagenet"), "cpu", amp=False
    )
    assert 0.1 < want["acc1"] < 0.9  # otherwise agreement would prove nothing
    assert got == pytest.approx(want, abs=1e-4)


def test_retrieval(peer, theirs, evaluate, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    words = [*COLOURS, "round", "square", "large", "small", "old", "new"]
    pairs = [
        (texture(i), [f"a {words[i % 10]} {words[(i + j) % 7]} {words[i // 10]} thing" for j in range(1 + i % 4)])
        for i in range(80)
    ]
    members = [
        member
        for i, (image, captions) in enumerate(pairs)
        for member in ((f"{i}.png", jpeg(image, "PNG")), (f"{i}.txt", "\n".join(captions).encode()))
    ]
    write_tar(tmp_path / "data" / "test" / "0.tar", members)
    (tmp_path / "data" / "test" / "nshards.txt").write_text("1")
    (tmp_path / "data" / "dataset_type.txt").write_text("retrieval")
    got = evaluate("retrieval", "--data", tmp_path / "data")
    net, preprocess, tokenizer = theirs
    loader = DataLoader(
        [(preprocess(image), captions) for image, captions in pairs],
        batch_size=16,
        collate_fn=lambda batch: (torch.stack([image for image, _ in batch]), [captions for _, captions in batch]),
    )
    want = peer("zeroshot_retrieval").evaluate(net, loader, tokenizer, "cpu", amp=False, recall_k_list=[1, 5, 10])
    assert 0 < want["image_retrieval_recall@10"] < 1
    assert {name: got[name] for name in want} == pytest.approx(want, abs=1e-4)
    assert set(got) - set(want) == {"image_retrieval_auc", "text_retrieval_auc"}
