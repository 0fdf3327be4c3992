from __future__ import annotations

import math
import shutil
from pathlib import Path

import pytest
import torch

from tests.trainer.labelled import write_folders
from tests.trainer.shards import jpeg, picture
from trainer.evaluate.__main__ import main
from trainer.evaluate.fewshot import draw_shots
from trainer.evaluate.logistic import fit, hold_out, predict
from trainer.evaluate.probe import search
from trainer.features import Encoder
from trainer.samples import Sample


@pytest.fixture
def data(tmp_path: Path) -> Path:
    write_folders(tmp_path / "data" / "train", 12, seed=1)
    write_folders(tmp_path / "data" / "test", 4, seed=2)
    return tmp_path / "data"


def blobs(classes: int = 3, each: int = 40) -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    labels = torch.arange(classes).repeat(each)
    return torch.randn(classes, 6)[labels] + torch.randn(len(labels), 6), labels


def test_the_fit_is_the_minimum_of_the_penalised_likelihood() -> None:
    features, labels = blobs()
    features = features.double()
    for l2 in (0.01, 3.0):
        weights, biases = (value.clone().requires_grad_() for value in fit(features, labels, 3, l2))
        loss = torch.nn.functional.cross_entropy(features @ weights.T + biases, labels, reduction="sum")
        loss = loss + l2 / 2 * weights.square().sum()
        gradient = torch.autograd.grad(loss, (weights, biases))
        assert max(g.abs().max().item() for g in gradient) < 0.02
        # Nothing penalises the biases: the classes' probabilities add up to the classes' counts.
        assert torch.allclose(
            (features @ weights.T + biases).softmax(1).sum(0), torch.full((3,), 40.0).double(), atol=0.02
        )


def test_regularisation_shrinks_the_weights_and_tiles_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    features, labels = blobs()
    weak, strong = fit(features, labels, 3, 0.1)[0], fit(features, labels, 3, 100.0)[0]
    assert strong.norm() < weak.norm() / 3
    whole = fit(features, labels, 3, 1.0)
    monkeypatch.setattr("trainer.evaluate.logistic.ROWS", 7)
    for ours, tiled in zip(whole, fit(features, labels, 3, 1.0)):
        assert torch.allclose(ours, tiled, atol=1e-2)
    assert torch.equal(predict(features, *whole)[:, 0], (features @ whole[0].T + whole[1]).argmax(1))


@pytest.mark.parametrize("peak", [-6.0, -2.375, 0.0, 3.125, 6.0])
def test_the_search_finds_a_single_peak_in_few_fits(peak: float) -> None:
    tried: list[float] = []

    def validate(l2: float) -> float:
        tried.append(math.log10(l2))
        return -abs(math.log10(l2) - peak)

    assert math.log10(search(validate)) == pytest.approx(peak)
    assert sorted(tried)[0] == pytest.approx(-6)
    assert sorted(tried)[-1] == pytest.approx(6)
    assert len(tried) == len(set(tried)) <= 7 + 4 * 2


def test_of_equals_the_strongest() -> None:
    assert search(lambda l2: float(l2 <= 1)) == pytest.approx(1)


def test_a_tenth_of_each_class_is_held_out() -> None:
    labels = torch.tensor([0] * 30 + [1] * 5 + [2])
    held = hold_out(labels, seed=0)
    assert [int(held[labels == label].sum()) for label in range(3)] == [3, 1, 0]
    assert not torch.equal(held, hold_out(labels, seed=1))


def test_more_shots_hold_the_fewer() -> None:
    labels = torch.arange(4).repeat(20)
    few, many = set(draw_shots(labels, 2, 5).tolist()), set(draw_shots(labels, 8, 5).tolist())
    assert few < many
    assert len(many) == 32
    assert labels[sorted(many)].bincount().tolist() == [8, 8, 8, 8]


def test_probe_of_a_folder(evaluate, data: Path) -> None:  # type: ignore[no-untyped-def]
    metrics = evaluate("probe", "--data", data)
    assert metrics["lp_acc1"] == 1.0  # colours are no secret even to random weights
    assert metrics["lp_acc5"] is None
    assert metrics["lp_mean_per_class_recall"] == 1.0
    assert 1e-6 <= metrics["l2"] <= 1e6
    assert metrics["train_images"] == 48
    given = evaluate(
        "probe", "--data", data / "test", "--train", data / "train", "--l2", 1e6, "--features", "embedding"
    )
    assert given["l2"] == 1e6


def test_few_shot_of_a_folder(evaluate, data: Path) -> None:  # type: ignore[no-untyped-def]
    metrics = evaluate("fewshot", "--data", data, "--shots", 1, 4, "--draws", 2)
    assert metrics["fs_acc1@4"] == 1.0
    assert metrics["fs_acc1_std@4"] == 0.0
    assert "fs_acc1@1" in metrics


def test_data_that_cannot_be_probed_is_refused(model: str, data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def error(*words: object) -> str:
        assert main([str(words[0]), "--model", model, *map(str, words[1:])]) == 2
        return capsys.readouterr().err

    assert "give --train FOLDER" in error("probe", "--data", data / "test")
    assert "12 pictures of 'blue', fewer than --shots 16" in error("fewshot", "--data", data)
    shutil.rmtree(data / "train" / "red")
    assert "its classes are not those of" in error("probe", "--data", data)


def test_penultimate_features_are_those_before_the_projection(encoder: Encoder) -> None:
    samples = [Sample("a", jpeg(picture("red", 0))), Sample("b", jpeg(picture("blue", 0)))]
    ((_, before),) = encoder.images(samples, penultimate=True)
    ((_, after),) = encoder.images(samples)
    projected = before @ encoder.model.visual.proj.detach()
    assert torch.allclose(projected / projected.norm(dim=1, keepdim=True), after, atol=1e-5)
