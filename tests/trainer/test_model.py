from __future__ import annotations

import ast
import json
from pathlib import Path

import pytest
import torch

import trainer
from trainer.export import export
from trainer.model import (
    ModelError,
    checkpoint_activations,
    create,
    encode_text,
    load,
    lock,
    model_config,
    open_clip,
    trim,
)


def test_the_trainer_imports_nothing_of_the_pipeline_and_open_clip_in_one_place() -> None:
    for path in Path(trainer.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert not {"pipeline", "open_clip"} & {name.split(".")[0] for name in names}, path


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
def test_our_attention_has_the_features_and_gradients_of_open_clips(precision: torch.dtype) -> None:
    torch.manual_seed(0)
    ours, _, tokenizer = create("scorer-64")
    theirs = open_clip.create_model("scorer-64").train()
    theirs.load_state_dict(ours.state_dict())
    pixels, tokens = torch.randn(3, 3, 64, 64), tokenizer(["a cat", "three blue circles above a green triangle", ""])
    got = {}
    for model in (ours, theirs):
        with torch.autocast("cpu", precision, enabled=precision != torch.float32):
            image, text = model.encode_image(pixels, normalize=True), model.encode_text(tokens, normalize=True)
        (image.float() @ text.float().T).trace().backward()
        attention = [model.visual.transformer.resblocks[0].attn, model.transformer.resblocks[0].attn]
        got[model] = [image, text, *(a.in_proj_weight.grad for a in attention)]
    tolerance = {"atol": 1e-5, "rtol": 1e-4} if precision == torch.float32 else {"atol": 0.03, "rtol": 0.05}
    for one, other in zip(got[ours], got[theirs]):
        torch.testing.assert_close(one, other, **tolerance)


def test_a_model_starts_from_the_weights_it_is_given(tmp_path: Path) -> None:
    torch.manual_seed(0)
    given, preprocess, _ = create("scorer-64")
    state = {"model": given.state_dict(), "model_config": model_config("scorer-64")}
    export({**state, "preprocess_config": preprocess.config}, tmp_path / "model")
    net, *_ = create("scorer-64", pretrained=str(tmp_path / "model"))
    for name, value in net.state_dict().items():
        assert torch.equal(value, given.state_dict()[name]), name
    with pytest.raises(ModelError, match="does not fit tiny-64"):
        create("tiny-64", pretrained=str(tmp_path / "model"))
    with pytest.raises(ModelError, match="a checkpoint file"):
        create("scorer-64", pretrained=str(tmp_path / "nowhere"))


def test_a_locked_resnet_keeps_its_batch_statistics() -> None:
    model, _, _ = create("tiny-rn-64")
    lock(model, image=True, text=False)
    before = {name: value.clone() for name, value in model.visual.state_dict().items()}
    model.encode_image(torch.randn(2, 3, 64, 64))
    assert all(torch.equal(value, before[name]) for name, value in model.visual.state_dict().items())
    assert not any(p.requires_grad for p in model.visual.parameters())
    assert model.text_projection.requires_grad
    assert model.logit_scale.requires_grad


def test_a_resnet_that_computes_its_activations_twice_learns_the_same() -> None:
    pixels, found = torch.randn(4, 3, 64, 64), []
    held: list[int] = []

    def note(value: torch.Tensor) -> torch.Tensor:
        held.append(value.nbytes)
        return value

    for again in (False, True):
        torch.manual_seed(0)
        model, _, _ = create("tiny-rn-64")
        if again:
            checkpoint_activations(model)
        held.clear()
        with torch.autograd.graph.saved_tensors_hooks(note, lambda value: value):
            features = model.encode_image(pixels)
        features.square().sum().backward()
        buffers = {f"{name} of batch norm": value for name, value in model.visual.named_buffers()}
        found.append((sum(held), buffers | {name: p.grad for name, p in model.visual.named_parameters()}))
    (plain, want), (less, got) = found
    assert less < plain * 0.6
    for name, value in want.items():
        torch.testing.assert_close(got[name], value, msg=name)


def test_weights_of_quickgelu_keep_it(tmp_path: Path) -> None:
    given, preprocess, _ = create("scorer-64")
    config = {**model_config("scorer-64"), "quick_gelu": True}
    state = {"model": given.state_dict(), "model_config": config, "preprocess_config": preprocess.config}
    export(state, tmp_path / "model")
    net, *_ = create("scorer-64", pretrained=str(tmp_path / "model"))
    assert isinstance(net.visual.transformer.resblocks[0].mlp.gelu, open_clip.transformer.QuickGELU)
    assert model_config("scorer-64", str(tmp_path / "model"))["quick_gelu"]


@pytest.mark.parametrize("captions", [3, 200])
def test_trimmed_text_gives_the_features_and_gradients_of_padded_text(captions: int) -> None:
    torch.manual_seed(0)
    model, _, tokenizer = create("scorer-64")
    few = ["a cat", "three blue circles above a large green triangle", ""]
    tokens = tokenizer([" ".join([few[i % 3]] * (1 + i % 7)) for i in range(captions)])
    trimmed, padded = encode_text(model, tokens), model.encode_text(tokens)
    assert torch.allclose(trimmed, padded, atol=1e-5)
    weights = [model.token_embedding.weight, model.text_projection, model.positional_embedding]
    for ours, theirs in zip(torch.autograd.grad(trimmed.sum(), weights), torch.autograd.grad(padded.sum(), weights)):
        assert torch.allclose(ours, theirs, rtol=1e-3, atol=1e-5 * captions)


def test_one_long_caption_costs_the_others_no_padding() -> None:
    model, _, tokenizer = create("scorer-64")
    tokens = tokenizer([*["a cat"] * 200, "word " * 100, *["a blue circle"] * 55])
    length = tokens.shape[1]
    groups = trim(model, tokens, multiple=8).groups
    assert {group.shape[1] for group in groups} == {8, length}
    assert sum(map(len, groups)) == 256
    assert sum(group.numel() for group in groups) < 0.5 * tokens.numel()


def test_a_text_tower_that_looks_ahead_goes_on_doing_so(tmp_path: Path) -> None:
    config = open_clip.get_model_config("scorer-64")
    config["text_cfg"]["no_causal_mask"] = True  # as CLIPA's
    (tmp_path / "ahead-64.json").write_text(json.dumps(config))
    open_clip.add_model_config(tmp_path)
    model, _, tokenizer = create("ahead-64")
    plain = open_clip.create_model("ahead-64")
    plain.load_state_dict(model.state_dict())
    tokens = tokenizer(["a cat", "three blue circles above a large green triangle"])
    with torch.no_grad():
        assert torch.allclose(encode_text(model.eval(), tokens), plain.eval().encode_text(tokens), atol=1e-5)


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
        ("ViT-B-32", "opanai", "did you mean openai"),
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
