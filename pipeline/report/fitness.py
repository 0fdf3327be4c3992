"""Measures how well a scorer separates each picture's own caption from other captions, on a run's stored embeddings.

A threshold on `clip_score` is useful only if captions that belong to a picture score above captions that do not. So
each picture is scored with its own caption and with captions of other rows, drawn at random. The AUC is the probability
that an own caption scores higher than another: 1 is perfect, 0.5 is guessing. The interval follows DeLong et al.
(1988); the thresholds of the verbal grades follow Hosmer and Lemeshow (2000).

Some captions of a web crawl do not match their picture, so even a perfect scorer stays below 1: the AUC is a lower
bound.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.reader import Run
from pipeline.similarity import embeddings
from pipeline.text.hashing import hash64
from pipeline.text.url import hosts

SAMPLE = 8192
"""Rows measured. This many give an interval of about ±0.01."""
UNITS = 16
"""Units that the rows come from. Few, because reading any vectors of a unit reads its whole file, and enough, because
each unit is a uniform sample of the pool."""
OTHERS = 8
"""Captions of other rows that each picture is scored with."""
MIN_ROWS = 50
"""Smallest sample or group for which an AUC is given."""
MOST_GROUPS = 8
"""Most languages, and most hosts, that are measured separately."""
BINS = 60
"""Bins of the histograms of scores."""


class Fit(NamedTuple):
    """How well own and other captions are separated in a group of rows."""

    group: str
    rows: int
    auc: float
    low: float
    high: float
    """Limits of the 95% interval of the AUC."""
    overlap: float
    """Common area of the two distributions of scores, from 0 to 1."""

    @property
    def word(self) -> str:
        """The verbal grade of the lower limit: not at all, poorly, fairly or well."""
        if self.low < 0.6:
            return "not at all"
        return "poorly" if self.low < 0.7 else "fairly" if self.low < 0.8 else "well"

    def __str__(self) -> str:
        figures = f"AUC {self.auc:.3f} [{self.low:.3f}, {self.high:.3f}], overlap {self.overlap:.0%}"
        return f"tells matching captions from others {self.word}: {figures}"


class Fitness(NamedTuple):
    """The result for one pair of embedding columns of a run."""

    score: str
    """The column of scores that the vectors belong to."""
    fits: list[Fit]
    """All rows first, then the languages and hosts with at least MIN_ROWS rows."""
    edges: np.ndarray
    own: np.ndarray
    other: np.ndarray
    """Histograms of the scores with own and with other captions: densities (BINS,) between the `edges` (BINS + 1,)."""


def measure(run: Run) -> list[Fitness]:
    """Returns the fitness of each model whose picture and caption vectors a run has stored; empty without any.

    Reads at most SAMPLE of the rows that the model scored, from UNITS units. Deterministic.
    """
    return [fitness for step in run.steps for fitness in _measure_step(run, step.label, list(step.adds))]


def _measure_step(run: Run, label: str, adds: list[str]) -> Iterator[Fitness]:
    for column in adds:
        if not (match := re.fullmatch(r"(.*)image_embedding", column)) or f"{match[1]}text_embedding" not in adds:
            continue
        score = match[1].removesuffix("_") or "clip_score"
        pictures, captions, groups = _sample(run, label, column, f"{match[1]}text_embedding")
        if len(pictures) >= MIN_ROWS:
            yield _fitness(score, pictures, captions, groups)


def _sample(run: Run, label: str, image: str, text: str) -> tuple[np.ndarray, np.ndarray, dict[str, np.ndarray]]:
    """Draws the sample: unit vectors of pictures and captions, float32 (n, d), and the language, host, caption and
    picture (sha256, or uid without it) of each row, each (n,)."""
    chosen = run.spread_units(UNITS)
    names = [c for c in ("uid", "url", "caption", "sha256", "language") if c in run.columns(label)]
    share = -(-SAMPLE // len(chosen))
    pictures, captions = [], []
    texts: dict[str, list[str]] = defaultdict(list)
    for unit in chosen:
        (rows,) = run.scan(names, after=label, units=[unit])
        order = np.argsort(hash64(rows["uid"], purpose="fitness"))[:share]
        rows = rows.take(np.sort(order))
        if not len(rows):
            continue
        vectors = run.take(unit, rows["row"].to_numpy(), [image, text])
        usable = embeddings.finite(vectors[image]) & embeddings.finite(vectors[text])
        vectors, rows = vectors.filter(usable), rows.filter(usable)
        pictures.append(embeddings.unit(embeddings.matrix(vectors[image])))
        captions.append(embeddings.unit(embeddings.matrix(vectors[text])))
        for name in names:
            texts[name] += pc.fill_null(rows[name].cast("string"), "").to_pylist()
    if not pictures:
        return np.empty((0, 1)), np.empty((0, 1)), {}
    columns = {
        "language": texts["language"],
        "host": pc.fill_null(hosts(pa.array(texts["url"], pa.string())), "").to_pylist(),
        "caption": texts["caption"],
        "picture": texts["sha256"] or texts["uid"],
    }
    return np.concatenate(pictures), np.concatenate(captions), {k: np.array(v, object) for k, v in columns.items() if v}


def _fitness(score: str, pictures: np.ndarray, captions: np.ndarray, columns: dict[str, np.ndarray]) -> Fitness:
    n = len(pictures)
    own = np.einsum("nd,nd->n", pictures, captions)
    rng = np.random.default_rng(0)
    shifts = rng.choice(np.arange(1, n), min(OTHERS, n - 1), replace=False)
    other = np.stack([np.einsum("nd,nd->n", pictures, np.roll(captions, -s, axis=0)) for s in shifts], axis=1)
    same = np.zeros(other.shape, bool)
    for column in ("caption", "picture"):  # an equal caption, or one of the same picture, is not another caption
        values = columns[column]
        same |= np.stack([values == np.roll(values, -s) for s in shifts], axis=1)
    other[same] = np.nan
    fits = [_fit("all rows", own, other)]
    for column in ("language", "host"):
        if column not in columns:
            continue
        common = Counter(columns[column].tolist()).most_common(MOST_GROUPS)
        if len(common) > 1:
            groups = [(name, columns[column] == name) for name, rows in common if name and rows >= MIN_ROWS]
            fits += [_fit(f"{column} {name}", own[rows], other[rows]) for name, rows in groups]
    values = other[np.isfinite(other)]
    low, high = min(own.min(), values.min()), max(own.max(), values.max())
    edges = np.linspace(low, high + 1e-6, BINS + 1)
    densities = (np.histogram(scores, edges, density=True)[0] for scores in (own, values))
    return Fitness(score, fits, edges, *densities)


def _fit(group: str, own: np.ndarray, other: np.ndarray) -> Fit:
    """Measures a group from its scores: `own` (n,), and `other` (n, k) with NaN for captions that do not count."""
    values = np.sort(other[np.isfinite(other)])
    sorted_own = np.sort(own)
    # The share of other scores below each own score, and of own scores above each other score; a tie counts half (Mann
    # and Whitney, 1947).
    above = (np.searchsorted(values, own, "left") + np.searchsorted(values, own, "right")) / (2 * len(values))
    ranks = np.searchsorted(sorted_own, values, "left") + np.searchsorted(sorted_own, values, "right")
    below = 1 - ranks / (2 * len(own))
    auc = float(above.mean())
    # A picture's other scores are not independent, so the second term counts pictures too, not scores.
    deviation = (above.var(ddof=1) / len(own) + below.var(ddof=1) / len(own)) ** 0.5
    edges = np.linspace(min(sorted_own[0], values[0]), max(sorted_own[-1], values[-1]) + 1e-6, BINS + 1)
    shares = [np.histogram(scores, edges)[0] / len(scores) for scores in (own, values)]
    overlap = float(np.minimum(*shares).sum())
    return Fit(group, len(own), auc, max(0.0, auc - 1.96 * deviation), min(1.0, auc + 1.96 * deviation), overlap)
