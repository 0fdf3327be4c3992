from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from torch.nn.functional import normalize

from tests.trainer.labelled import write_folders
from tests.trainer.shards import samples, write_shards
from trainer.config import ConfigError
from trainer.features import Encoder
from trainer.moderate import Label, Moderator, Policy, main, read_policy

EXAMPLE = Path(__file__).parents[2] / "conf" / "policy_example.yaml"
POLICY = """
neutral: [a photo]
labels:
  red: {threshold: 0, prompts: [red, crimson]}
  none: {threshold: 1, prompts: [x]}
"""


def test_the_example_policy_is_one() -> None:
    policy = read_policy(EXAMPLE)
    assert {"nudity", "violence", "weapons"} <= set(policy.labels)
    assert all(0.5 < label.threshold <= 1 for label in policy.labels.values())


def test_a_score_is_the_odds_of_the_best_prompt_against_the_best_neutral_one(encoder: Encoder) -> None:
    policy = Policy(["a photo", "a drawing"], {"shape": Label(0.5, ["a circle", "a square"])})
    torch.manual_seed(0)
    images = normalize(torch.randn(20, 64), dim=1)
    found = Moderator(encoder, policy).judge(images)
    scale = encoder.model.logit_scale.exp().item()
    neutral, prompts = encoder.texts(policy.neutral), encoder.texts(policy.labels["shape"].prompts)
    for image, verdict in zip(images, found):
        cosines = prompts @ image
        want = 1 / (1 + math.exp(-scale * (cosines.max() - (neutral @ image).max()).item()))
        score = verdict["scores"]["shape"]
        assert score["score"] == pytest.approx(want, abs=1e-3)
        assert score["prompt"] == policy.labels["shape"].prompts[int(cosines.argmax())]
        assert verdict["flagged"] == (["shape"] if want >= 0.5 else [])
    assert {tuple(verdict["flagged"]) for verdict in found} == {(), ("shape",)}


def test_every_picture_gets_a_line(model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "policy.yaml").write_text(POLICY)
    pairs = samples(5)
    pairs[2] = (b"\xff\xd8 cut", "corrupt")
    shards = write_shards(tmp_path / "shards", pairs)
    folder = write_folders(tmp_path / "folder", 1)
    for source, count in ((shards, 5), (folder, 4)):
        assert main([str(source), "--model", model, "--policy", str(tmp_path / "policy.yaml")]) == 0
        lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
        assert len(lines) == len({line["image"] for line in lines}) == count
        for line in lines:
            if line["image"] == "00000.tar:000000002":
                assert line["flagged"] is None
                assert "not a JPEG" in line["error"]
            else:
                assert line["flagged"] == ["red"]
                assert line["scores"]["red"]["prompt"] in ("red", "crimson")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("labels: {}", "`neutral`"),
        ("neutral: [a]\nlabels: {}", "at least one"),
        ("neutral: []\nlabels: {x: {threshold: 0.5, prompts: [a]}}", "neutral"),
        ("neutral: [a]\nlabels: {x: {threshold: 5, prompts: [a]}}", r"labels\.x\.threshold: found 5"),
        ("neutral: [a]\nlabels: {x: {threshold: no, prompts: [a]}}", "found 'no', expected a number"),
        ("neutral: [a]\nlabels: {x: {threshold: 0.5, prompts: a}}", r"labels\.x: expected"),
        ("neutral: [a]\nlabels: {x: {treshold: 0.5, prompts: [a]}}", r"labels\.x: expected"),
        ("neutral: [a", r"policy\.yaml:1: not valid YAML"),
        (
            "neutral: [a]\nlabels:\n  x: {threshold: 0, prompts: [a]}\n  x: {threshold: 0, prompts: [b]}",
            r":4: labels\.x: duplicate",
        ),
    ],
)
def test_mistakes_in_a_policy_are_reported(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "policy.yaml").write_text(text)
    with pytest.raises(ConfigError, match=message):
        read_policy(tmp_path / "policy.yaml")
