"""The fitness of a scorer, on scores for which the result is known."""

from __future__ import annotations

import numpy as np
import pytest

from pipeline.report.fitness import _fit, _fitness


def columns(n: int, **given: list[str]) -> dict[str, np.ndarray]:
    values = {"caption": [f"c{i}" for i in range(n)], "picture": [f"p{i}" for i in range(n)], **given}
    return {name: np.array(column, object) for name, column in values.items()}


@pytest.mark.parametrize(
    ("own", "other", "auc", "word"),
    [
        (np.linspace(1, 2, 400), np.linspace(0, 0.9, 400)[:, None], 1.0, "well"),
        (np.linspace(0, 1, 400), np.linspace(0, 1, 400)[:, None], 0.5, "not at all"),
        (np.zeros(400), np.zeros((400, 2)), 0.5, "not at all"),
        (np.linspace(0, 1, 400), np.linspace(1, 2, 400)[:, None], 0.0, "not at all"),
    ],
)
def test_the_area_under_the_curve(own: np.ndarray, other: np.ndarray, auc: float, word: str) -> None:
    fit = _fit("all", own, other)
    assert fit.auc == pytest.approx(auc, abs=0.002)
    assert fit.low <= fit.auc <= fit.high
    assert fit.word == word
    assert fit.overlap == pytest.approx(1.0 if auc == 0.5 else 0.0, abs=0.05)


def test_the_interval_has_the_coverage_it_claims() -> None:
    rng = np.random.default_rng(0)
    truth, inside = 0.7602, 0  # Φ(1/√2) of two normal distributions one standard deviation apart
    for _ in range(200):
        fit = _fit("all", rng.normal(1, 1, 300), rng.normal(0, 1, (300, 4)))
        inside += fit.low <= truth <= fit.high
    assert 180 <= inside <= 200


def test_a_random_scorer_is_unfit_and_a_good_one_is_fit() -> None:
    rng = np.random.default_rng(1)
    pictures = rng.normal(size=(600, 32))
    noise = rng.normal(size=(600, 32))
    assert _fitness("s", pictures, noise, columns(600)).fits[0].word == "not at all"
    assert _fitness("s", pictures, pictures + 0.5 * noise, columns(600)).fits[0].auc > 0.99


def test_copies_do_not_count_as_other_captions_and_groups_are_separate() -> None:
    rng = np.random.default_rng(2)
    one = rng.normal(size=(1, 16))
    pictures = np.concatenate([np.repeat(one, 300, axis=0), rng.normal(size=(300, 16))])
    captions = pictures.copy()
    captions[300:450] = rng.normal(size=(150, 16))  # the German captions are wrong
    languages = ["en"] * 300 + ["de"] * 150 + ["en"] * 150
    captioned = ["the same"] * 300 + [f"c{i}" for i in range(300)]
    fitness = _fitness("s", pictures, captions, columns(600, language=languages, caption=captioned))
    fits = {fit.group: fit for fit in fitness.fits}
    assert fits["language en"].auc > 0.99
    assert fits["language de"].word == "not at all"
    assert sum(fitness.own * np.diff(fitness.edges)) == pytest.approx(1)
