from __future__ import annotations

import ast
import json
from pathlib import Path

import pytest
import torch

import trainer
from trainer.loss import clip_loss
from trainer.model import ModelError, create, encode_text, load, open_clip


def test_the_trainer_imports_nothing_of_the_pipeline_and_open_clip_in_one_place() -> None:
    for path in Path(trainer.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert not {"pipeline", "open_clip"} & {name.split(".")[0] for name in names}, path


def test_loss_is_that_of_open_clip() -> None:
    torch.manual_seed(0)
    for count in (1, 5, 16):
        image, text = (torch.nn.functional.normalize(torch.randn(count, 8), dim=1).requires_grad_() for _ in range(2))
        scale = torch.tensor(2.0, requires_grad=True)
        got = torch.autograd.grad(clip_loss(image, text, scale), (image, text, scale))
        want = torch.autograd.grad(open_clip.ClipLoss()(image, text, scale.exp()), (image, text, scale))
        for ours, theirs in zip(got, want):
            assert torch.allclose(ours, theirs, atol=1e-6)


def test_trimmed_text_gives_the_features_and_gradients_of_padded_text() -> None:
    torch.manual_seed(0)
    model, _, tokenizer = create("scorer-64")
    tokens = tokenizer(["a cat", "three blue circles above a large green triangle", ""])
    trimmed, padded = encode_text(model, tokens), model.encode_text(tokens)
    assert torch.allclose(trimmed, padded, atol=1e-5)
    weights = [model.token_embedding.weight, model.text_projection, model.positional_embedding]
    for ours, theirs in zip(torch.autograd.grad(trimmed.sum(), weights), torch.autograd.grad(padded.sum(), weights)):
        assert torch.allclose(ours, theirs, atol=1e-4)


def test_text_that_fills_the_context_is_not_cut() -> None:
    model, _, tokenizer = create("scorer-64")
    tokens = tokenizer(["word " * 100])
    assert torch.allclose(encode_text(model, tokens), model.encode_text(tokens), atol=1e-5)


def folder_without_weights(folder: Path) -> str:
    config = {"model_cfg": open_clip.get_model_config("scorer-64"), "preprocess_cfg": {}}
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    torch.save({}, folder / "open_clip_pytorch_model.pt")
    return str(folder)


@pytest.mark.parametrize(
    ("name", "pretrained", "said"),
    [
        ("ViT-B-23", None, "ViT-B-32"),
        ("ViT-B-32", None, "a name alone has no weights; `pretrained` must be one of its tags \\(openai"),
        ("ViT-B-32", "opanai", "did you mean 'openai'"),
        ("scorer-64", None, "no published weights"),
        ("local-dir:/nowhere/at/all", None, "does not exist"),
    ],
)
def test_never_random_weights_for_a_name(name: str, pretrained: str | None, said: str) -> None:
    with pytest.raises(ModelError, match=said):
        load(name, pretrained)


def test_never_random_weights_for_a_folder(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"no open_clip_config.json \(found: nothing"):
        load(str(tmp_path))
    folder = folder_without_weights(tmp_path)
    with pytest.raises(ModelError, match=r"no open_clip_model.safetensors \(found: .*open_clip_pytorch_model.pt"):
        load(folder)
    (tmp_path / "open_clip_model.safetensors").write_bytes(b"garbage")
    with pytest.raises(ModelError, match="cannot load"):
        load(folder)


def test_openai_weights_get_the_activation_they_were_trained_with(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = {}

    def spy(name: str, **options: object) -> None:
        seen.update(options)
        raise OSError("no network")

    monkeypatch.setattr(open_clip, "create_model", spy)
    for tag, quick in (("openai", True), ("laion2b_s34b_b79k", False)):
        with pytest.raises(ModelError, match="Without a network"):
            load("ViT-B/32", tag)
        assert seen["force_quick_gelu"] is quick
        assert seen["require_pretrained"] is True
