from __future__ import annotations

import json
from pathlib import Path

import pytest
from scipy.special import expit, logit

from tests.trainer.labelled import write_folders
from trainer.evaluate.__main__ import main
from trainer.evaluate.robustness import effective_robustness

ACCURACIES = [0.55, 0.6, 0.7, 0.76, 0.81]


def line(accuracy: float) -> float:
    """Shifted accuracies that lie on a line of slope 0.9 through the logits."""
    return float(expit(0.9 * logit(accuracy) - 0.5))


def test_effective_robustness_is_zero_on_the_fitted_line() -> None:
    baselines = [(acc, line(acc)) for acc in ACCURACIES]
    found = effective_robustness(0.65, line(0.65), baselines)
    assert found["effective_robustness"] == pytest.approx(0, abs=1e-9)
    assert (found["slope"], found["intercept"]) == (pytest.approx(0.9), pytest.approx(-0.5))
    assert found["r2"] == pytest.approx(1)
    above = effective_robustness(0.65, line(0.65) + 0.2, baselines)
    assert above["effective_robustness"] == pytest.approx(0.2)
    assert above["expected_acc1"] == pytest.approx(line(0.65))


def write_baselines(path: Path) -> Path:
    rows = [f"m{i},{acc},{line(acc)}," for i, acc in enumerate(ACCURACIES)]
    path.write_text("\n".join(["model,imagenet,v2,sketch", *rows]) + "\n")
    return path


def write_result(path: Path, dataset: str, acc1: float, model: str = "x") -> str:
    path.write_text(json.dumps({"dataset": dataset, "model": model, "metrics": {"acc1": acc1}}))
    return str(path)


def test_earlier_results_need_no_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["robustness", "--data", write_result(tmp_path / "a.json", "imagenet", 0.7)]
    words += ["--shift", "v2=" + write_result(tmp_path / "b.json", "called otherwise", 0.68)]
    words += ["--baselines", str(write_baselines(tmp_path / "base.csv"))]
    assert main([*words, "--reference", "m1"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert (result["dataset"], result["model"]) == ("imagenet", "x")
    metrics = result["metrics"]
    assert metrics["acc1"] == 0.7
    assert metrics["shifts"]["v2"]["effective_robustness"] == pytest.approx(0.68 - line(0.7))
    assert metrics["shifts"]["v2"]["relative_robustness"] == pytest.approx(0.68 - line(0.6))
    assert metrics["mean_effective_robustness"] == metrics["shifts"]["v2"]["effective_robustness"]

    assert main([*words, "--reference", "m9"]) == 2
    assert "no model 'm9'; there are m0, m1" in capsys.readouterr().err
    assert main([*words, "--shift", write_result(tmp_path / "c.json", "sketch", 0.4)]) == 2
    assert "'imagenet' and 'sketch': 0 models have both" in capsys.readouterr().err
    assert main([*words, "--shift", write_result(tmp_path / "d.json", "v3", 0.4, model="y")]) == 2
    assert "results of different models: x, y" in capsys.readouterr().err
    (tmp_path / "base.csv").write_text("model,imagenet,v2\na,76.1,63.3\nb,81.1,69.5\n")
    assert main(words) == 2
    assert "divide percentages by 100" in capsys.readouterr().err


def test_datasets_are_evaluated_zero_shot(evaluate, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    one, other = write_folders(tmp_path / "imagenet", 2), write_folders(tmp_path / "v2", 2, seed=1)
    baselines = tmp_path / "base.json"
    rows = [{"model": f"m{i}", "imagenet": acc, "v2": line(acc)} for i, acc in enumerate(ACCURACIES)]
    baselines.write_text(json.dumps(rows))
    found = evaluate("robustness", "--data", one, "--shift", other, "--baselines", baselines)
    assert found["acc1"] == evaluate("zeroshot", "--data", one)["acc1"]
    assert found["shifts"]["v2"]["acc1"] == evaluate("zeroshot", "--data", other)["acc1"]


def test_a_folder_needs_a_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = write_folders(tmp_path / "imagenet", 1)
    baselines = str(write_baselines(tmp_path / "base.csv"))
    assert main(["robustness", "--data", str(data), "--shift", str(data), "--baselines", baselines]) == 2
    assert "--model" in capsys.readouterr().err
