from __future__ import annotations

import argparse
import ast
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import trainer
from tests.trainer.models import COCA, TEXT
from trainer.export import export
from trainer.model import (
    ModelError,
    checkpoint_activations,
    create,
    encode_text,
    freeze_unreached,
    load,
    lock,
    model_config,
    open_clip,
    read_weights,
    trim,
)

FASTVIT = {"timm_model_name": "fastvit_t8", "timm_pool": "avg", "timm_proj": "linear", "image_size": 64}
OTHER_TOWERS = {
    "fastvit-64": {  # batch norms and stochastic depth
        "embed_dim": 64,
        "vision_cfg": {**FASTVIT, "timm_drop_path": 0.2},
        "text_cfg": TEXT,
        "custom_text": True,
    },
    "coca-64": COCA,
}


@pytest.fixture(scope="module", autouse=True)
def other_towers(tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.mktemp("models")
    for name, config in OTHER_TOWERS.items():
        (folder / f"{name}.json").write_text(json.dumps(config))
    open_clip.add_model_config(folder)


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


@pytest.mark.parametrize("name", ["scorer-64", "tiny-rn-64", *OTHER_TOWERS])
def test_checkpointed_activations_do_not_change_the_result(name: str) -> None:
    found = []
    for again in (False, True):
        torch.manual_seed(0)
        model, preprocess, tokenizer = create(name)
        if again:
            checkpoint_activations(model)
        pixels = torch.randn(4, 3, preprocess.size, preprocess.size)
        image, text = model.encode_image(pixels), encode_text(model, tokenizer(["a cat", "a dog", "b", "c d e"]))
        (image.sin().sum() + text.cos().sum()).backward()
        gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        found.append(gradients | {f"{name} of batch norm": value for name, value in model.named_buffers()})
    want, got = found
    assert want.keys() == got.keys()
    for name, value in want.items():
        assert torch.equal(got[name], value), name


def test_parameters_without_effect_on_the_features_are_frozen() -> None:
    model, preprocess, tokenizer = create("coca-64")
    freeze_unreached(model, preprocess, tokenizer)
    frozen = {name.split(".")[0] for name, p in model.named_parameters() if not p.requires_grad}
    assert frozen == {"text_decoder"}
    plain, preprocess, tokenizer = create("tiny-rn-64")
    before = {name: value.clone() for name, value in plain.state_dict().items()}
    freeze_unreached(plain, preprocess, tokenizer)
    assert all(p.requires_grad and p.grad is None for p in plain.parameters())
    assert all(torch.equal(value, before[name]) for name, value in plain.state_dict().items())


class Malicious:
    """Pickled as a call that makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return exec, (f"open({str(self.path)!r}, 'w')",)


SAVED: dict[str, Callable[[dict[str, Any], Path], Any]] = {
    "a state dict": lambda state, at: state,
    "open_clip's": lambda state, at: {"epoch": 3, "state_dict": state},
    "this trainer's": lambda state, at: {"model": state, "model_config": model_config("scorer-64"), "step": 1},
    "compiled": lambda state, at: {"state_dict": {f"_orig_mod.{name}": value for name, value in state.items()}},
    "distributed and compiled": lambda state, at: {f"module._orig_mod.{name}": v for name, v in state.items()},
    "with a Namespace": lambda state, at: {"state_dict": state, "args": argparse.Namespace(lr=1)},
    "with code": lambda state, at: {"state_dict": state, "args": Malicious(at / "owned")},
}


@pytest.mark.parametrize("kind", SAVED)
def test_weights_are_found_in_every_checkpoint_without_running_its_code(tmp_path: Path, kind: str) -> None:
    torch.manual_seed(0)
    state = create("scorer-64")[0].state_dict()
    torch.save(SAVED[kind](state, tmp_path), tmp_path / "weights.pt")
    for net in (create("scorer-64", pretrained=str(tmp_path / "weights.pt"))[0],
                load("scorer-64", str(tmp_path / "weights.pt"))[0]):  # fmt: skip
        assert all(torch.equal(value, state[name]) for name, value in net.state_dict().items())
    assert not (tmp_path / "owned").exists()


@pytest.mark.parametrize(
    ("saved", "message"),
    [
        (b"", "cannot be read as weights"),
        (b"<html>404</html>", "cannot be read as weights"),
        ({}, "expected a state dict"),
        ([torch.zeros(1)], "expected a state dict"),
        ({"state_dict": argparse.Namespace(a=1)}, "expected a state dict"),
        ({"optimizer": {"lr": 1}}, "expected a state dict"),
    ],
)
def test_a_file_without_weights_is_refused_in_one_line(tmp_path: Path, saved: Any, message: str) -> None:
    path = tmp_path / "weights.pt"
    path.write_bytes(saved) if isinstance(saved, bytes) else torch.save(saved, path)
    with pytest.raises(ModelError, match=message) as error:
        read_weights(path)
    assert len(str(error.value).splitlines()) == 1


def test_a_checkpoint_of_the_trainer_brings_its_activation_and_its_bias(tmp_path: Path) -> None:
    model, *_ = create("scorer-64", siglip=True)
    config = {**model_config("scorer-64", siglip=True), "quick_gelu": True}
    torch.save({"model": model.state_dict(), "model_config": config, "step": 1}, tmp_path / "step-00000001.pt")
    net, *_ = load("scorer-64", str(tmp_path / "step-00000001.pt"))
    assert isinstance(net.visual.transformer.resblocks[0].mlp.gelu, open_clip.transformer.QuickGELU)
    assert net.logit_bias.item() == -10


@pytest.mark.parametrize(("trained", "start"), [(None, (-10, 10)), (-7.5, (-7.5, 14.2857))])
def test_the_sigmoid_loss_has_its_own_start_values_even_with_clip_weights(
    tmp_path: Path, trained: float | None, start: tuple[float, float]
) -> None:
    state = create("scorer-64")[0].state_dict()
    if trained is not None:
        state["logit_bias"] = torch.tensor(trained)
    torch.save(state, tmp_path / "weights.pt")
    net, *_ = create("scorer-64", pretrained=str(tmp_path / "weights.pt"), siglip=True)
    assert (net.logit_bias.item(), net.logit_scale.exp().item()) == pytest.approx(start)


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


def test_one_long_caption_does_not_pad_the_others() -> None:
    model, _, tokenizer = create("scorer-64")
    tokens = tokenizer([*["a cat"] * 200, "word " * 100, *["a blue circle"] * 55])
    length = tokens.shape[1]
    groups = trim(model, tokens, multiple=8).groups
    assert {group.shape[1] for group in groups} == {8, length}
    assert sum(map(len, groups)) == 256
    assert sum(group.numel() for group in groups) < 0.5 * tokens.numel()


def test_a_text_tower_without_a_causal_mask_still_sees_later_tokens(tmp_path: Path) -> None:
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
    ("name", "pretrained", "message"),
    [
        ("ViT-B-23", None, "ViT-B-32"),
        ("ViT-B-32", None, "a name alone has no weights; `pretrained` must be one of its tags \\(openai"),
        ("ViT-B-32", "opanai", "did you mean openai"),
        ("scorer-64", None, "no published weights"),
        ("local-dir:/nowhere/at/all", None, "does not exist"),
    ],
)
def test_never_random_weights_for_a_name(name: str, pretrained: str | None, message: str) -> None:
    with pytest.raises(ModelError, match=message):
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
