from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, multiprocessing
from torch.nn import functional as F

from tests.trainer.ranks import check_loss
from trainer import loss
from trainer.loss import chance, clip_loss, siglip_loss
from trainer.model import open_clip

LOSSES = ("clip", "siglip")


def leaves(count: int, width: int = 8, dtype: torch.dtype = torch.float32, seed: int = 0) -> list[Tensor]:
    """Unit features of `count` images and texts that agree somewhat, the log of the scale, the bias."""
    torch.manual_seed(seed)
    image = F.normalize(torch.randn(count, width), dim=1)
    text = F.normalize(image + 0.5 * torch.randn(count, width), dim=1)
    return [v.requires_grad_() for v in (image.to(dtype), text.to(dtype), torch.tensor(2.5), torch.tensor(-3.0))]


def ours(kind: str, image: Tensor, text: Tensor, log_scale: Tensor, bias: Tensor) -> Tensor:
    if kind == "clip":
        return clip_loss(image, text, log_scale)[0]
    return siglip_loss(image, text, log_scale, bias)[0]


def theirs(kind: str, image: Tensor, text: Tensor, log_scale: Tensor, bias: Tensor) -> Tensor:
    image, text = image.float(), text.float()
    if kind == "clip":
        return open_clip.ClipLoss()(image, text, log_scale.exp()) + 0 * bias
    return open_clip.loss.SigLipLoss()(image, text, log_scale.exp(), bias)


def assert_same(kind: str, inputs: list[Tensor]) -> None:
    got, want = ours(kind, *inputs), theirs(kind, *inputs)
    assert got.item() == pytest.approx(want.item(), rel=1e-5, abs=1e-6)
    ours_at, theirs_at = (torch.autograd.grad(value, inputs, allow_unused=True) for value in (3 * got, 3 * want))
    for name, one, other in zip(("image", "text", "log_scale", "bias"), ours_at, theirs_at):
        if kind == "clip" and name == "bias":
            assert one is None
            continue
        assert one is not None
        assert one.dtype == other.dtype, name
        tolerance = {"rtol": 1e-5, "atol": 5e-6} if one.dtype == torch.float32 else {"rtol": 1e-2, "atol": 1e-4}
        assert torch.allclose(one, other, **tolerance), name


@pytest.mark.parametrize("kind", LOSSES)
@pytest.mark.parametrize("count", [1, 5, 16, 37])
@pytest.mark.parametrize("rows", [1, 4, 16, 64])
def test_in_any_blocks_value_and_gradients_are_those_of_open_clip(
    kind: str, count: int, rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loss, "LOGITS_AT_ONCE", rows * count)
    assert_same(kind, leaves(count))


@pytest.mark.parametrize("kind", LOSSES)
def test_features_of_autocast_are_taken_as_they_are(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loss, "LOGITS_AT_ONCE", 100)
    assert_same(kind, leaves(21, dtype=torch.bfloat16))


def test_logits_far_apart_do_not_overflow() -> None:
    image = F.normalize(torch.randn(6, 8), dim=1)
    inputs = [image.requires_grad_(), (-image).detach().requires_grad_(), torch.tensor(math.log(100.0)), leaves(1)[3]]
    value, each = clip_loss(*inputs[:3])
    assert value.item() == pytest.approx(open_clip.ClipLoss()(image, -image, torch.tensor(100.0)).item(), rel=1e-5)
    assert value.item() > 50
    assert each.mean().item() == pytest.approx(value.item())


@pytest.mark.parametrize("kind", LOSSES)
def test_no_tensor_as_large_as_the_matrix_of_logits_is_made(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    count, rows = 300, 10
    monkeypatch.setattr(loss, "LOGITS_AT_ONCE", rows * count)
    sizes: list[int] = []

    class Sizes(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            out = func(*args, **(kwargs or {}))
            sizes.extend(v.numel() for v in torch.utils._pytree.tree_leaves(out) if isinstance(v, Tensor))
            return out

    inputs = leaves(count)
    with Sizes():
        ours(kind, *inputs).backward()
    assert max(sizes) == rows * count


@pytest.mark.parametrize("kind", LOSSES)
def test_chance_is_the_loss_of_a_model_with_equal_features(kind: str) -> None:
    count = 64
    same = torch.ones(count, 1)
    # Equal features: CLIP's softmaxes are uniform; SigLIP's best answer to every pair is a probability of 1 / N.
    best = torch.tensor(-math.log(count - 1) - 1.0)
    assert ours(kind, same, same, torch.tensor(0.0), best).item() == pytest.approx(chance(count, kind), rel=1e-5)


def test_each_pairs_share_finds_the_mismatch() -> None:
    image, text, log_scale, bias = leaves(9)
    with torch.no_grad():
        text[4] = -text[4]
    for each in (clip_loss(image, text, log_scale)[1], siglip_loss(image, text, log_scale, bias)[1]):
        assert each.argmax() == 4


def test_ranks_together_have_the_loss_and_gradient_of_the_whole_batch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    cases: dict[str, Any] = {}
    for kind in LOSSES:
        whole = leaves(20)
        value = theirs(kind, *whole)
        gradients = list(torch.autograd.grad(value, whole))
        gradients[3] = gradients[3] if kind == "siglip" else None
        cases[kind] = [v.detach() for v in whole], value.detach(), gradients
    multiprocessing.spawn(check_loss, (str(tmp_path), cases), nprocs=4)  # type: ignore[no-untyped-call]
