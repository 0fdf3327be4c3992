from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from tests.trainer.shards import samples, write_shards
from trainer import cost, loss
from trainer.config import load_config

PRESETS = sorted((Path(__file__).parents[2] / "conf").glob("train_*.yaml"))
# Of the paper's models, the peak rates as its tables 18 to 20 have them.
RATES = {"rn50": 5e-4, "rn101": 5e-4, "rn50x4": 5e-4, "rn50x16": 4e-4, "rn50x64": 3.6e-4}
RATES |= {"vit_b32": 5e-4, "vit_b16": 5e-4, "vit_l14": 4e-4, "vit_l14_336": 2e-5}


def page(conf: Path | str, *overrides: str) -> str:
    return cost.estimate(load_config(conf, overrides))


def figure(text: str, pattern: str) -> float:
    found = re.search(pattern.replace("#", r"([\d,.]+)"), text)
    assert found, text
    return float(found[1].replace(",", ""))


# The largest models take seconds each, and say no more than their smaller relatives.
LARGE = ("train_rn50x16", "train_rn50x64", "train_vit_l14", "train_vit_l14_336", "train_datacomp_xlarge")


@pytest.mark.parametrize(
    "conf",
    [pytest.param(path, marks=pytest.mark.slow if path.stem in LARGE else (), id=path.stem) for path in PRESETS],
)
def test_every_preset_has_a_plan_without_its_data(conf: Path) -> None:
    plan = page(conf, "shards=nowhere")
    assert "missing: shards: nowhere" in plan
    for pattern in (r"# M parameters", r"# GFLOPs per sample", r"memory +about # GB", r"# GPU-hours on an H100 at 40%"):
        figure(plan, pattern)


def test_the_papers_presets_are_the_papers() -> None:
    for name, lr in RATES.items():
        config = load_config(next(path for path in PRESETS if path.stem == f"train_{name}"))
        resnet = name.startswith("rn")
        assert (config.lr, config.batch_size, config.weight_decay) == (lr, 32768, 0.2)
        assert (config.beta1, config.beta2, config.eps) == ((0.9, 0.999, 1e-8) if resnet else (0.9, 0.98, 1e-6))
        if name != "vit_l14_336":
            assert (config.epochs, config.warmup) == (32, 2000)


@pytest.fixture
def conf(tmp_path: Path) -> Path:
    path = tmp_path / "c.yaml"
    options = "model: tiny-64\nlr: 1e-3\nbatch_size: 8192\nepochs: 3\nprecision: bf16\n"  # auto depends on the CPU
    path.write_text(f"shards: {tmp_path}/shards\noutput: o\n{options}")
    return path


def test_flops_are_those_of_the_towers_and_three_passes(conf: Path) -> None:
    # 7.4 billion multiply-adds at 224 px and 77 tokens (open_clip's model profile), 2 FLOPs each.
    plan = page(conf, "model=ViT-B-32")
    assert figure(plan, "# forward") == pytest.approx(2 * 7.4, rel=0.02)
    assert figure(plan, "# GFLOPs") == pytest.approx(3 * figure(plan, "# forward"), rel=0.02)
    cached = page(conf, "model=ViT-B-32", "micro_batch_size=256")
    assert figure(cached, "# GFLOPs") == pytest.approx(4 * figure(plan, "# forward"), rel=0.02)


def test_memory_is_estimated_from_what_is_held_at_the_same_time(conf: Path) -> None:
    plan = page(conf)
    activations = figure(plan, "activations #")
    assert figure(page(conf, "micro_batch_size=2048"), "activations #") == pytest.approx(activations / 4, rel=0.05)
    assert figure(page(conf, "ranks=4"), "activations #") == pytest.approx(activations / 4, rel=0.05)
    assert figure(page(conf, "precision=fp32"), "activations #") == pytest.approx(activations * 2, rel=0.05)
    assert figure(page(conf, "grad_checkpointing=true"), "activations #") < activations * 0.7
    assert "more than a GPU of 80 GB has" not in plan
    large = page(conf, "batch_size=1048576")
    fits = int(figure(large, "micro_batch_size to at most #"))
    assert "more than a GPU" not in page(conf, "batch_size=1048576", f"micro_batch_size={fits}")


def test_a_locked_tower_costs_its_forward_pass_and_its_weights(conf: Path, tmp_path: Path) -> None:
    plan = page(conf, "model=ViT-B-32")
    locked = page(conf, "model=ViT-B-32", "lock_image=true", f"pretrained={tmp_path}/absent")
    assert f"missing: pretrained '{tmp_path}/absent'" in locked
    assert "63.4 M of them trained" in locked
    assert figure(locked, "# forward") == figure(plan, "# forward")
    assert figure(locked, "# backward") == pytest.approx(figure(plan, "# backward") * 0.4, rel=0.05)
    assert figure(locked, "activations #") < figure(plan, "activations #") * 0.6
    # 12 bytes for each of 87.8 million weights that need no gradient and no moments.
    assert figure(plan, "AdamW #") - figure(locked, "AdamW #") == pytest.approx(1.05, abs=0.1)


def test_steps_come_from_the_shards_or_from_samples(conf: Path, tmp_path: Path) -> None:
    assert "steps        12 of 8,192 samples, warm-up" in page(conf, "samples=100000")
    assert "if an epoch has 100,000,000 samples" in page(conf)
    write_shards(tmp_path / "shards", samples(40))
    assert "steps        15 of 8 samples (3 epochs of 5)" in page(conf, "batch_size=8")
    assert "steps        25 of 8 samples (5 epochs of 5)" in page(conf, "batch_size=8", "samples=200")
    assert "batch_size is larger than the data" in page(conf)


@pytest.mark.parametrize("pairs", [1000, 8192, 32768])
@pytest.mark.parametrize("kind", ["clip", "siglip"])
def test_the_loss_uses_the_memory_that_the_plan_predicts(pairs: int, kind: str) -> None:
    image, text = torch.empty(pairs, 512, device="meta"), torch.empty(pairs, 512, device="meta")
    scale, bias = torch.empty((), device="meta"), torch.empty((), device="meta")
    with cost.Meter() as meter:
        loss.clip_loss(image, text, scale) if kind == "clip" else loss.siglip_loss(image, text, scale, bias)
    assert meter.bytes <= loss.memory(pairs, pairs, 512) <= 1.6 * meter.bytes
