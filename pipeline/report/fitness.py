"""Measures how well the scorer tells a picture's own caption from others, on the stored embeddings of a run.

A threshold on `clip_score` is useful only if captions that belong to a picture score above captions that do not. So
each picture is scored with its own caption and with captions of other rows, drawn at random. The AUC is the probability
that an own caption scores higher than another: 1 is perfect, 0.5 is guessing. Its interval is DeLong's (DeLong et al.,
1988); the words for it are those of Hosmer and Lemeshow (2000).

The own captions of a web crawl are partly wrong, so a perfect scorer stays below 1: this is a lower bound.
"""

from __future__ import annotations

import re
from collections import Counter
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
"""Rows that are measured: the interval is then about ±0.01."""
UNITS = 16
"""Units that these rows come from. A unit is a uniform sample of the pool, and reading its vectors reads its whole
file."""
OTHERS = 8
"""Captions of other rows that each picture is scored with."""
LEAST = 50
"""Fewest rows for which a figure is given."""
GROUPS = 8
"""Languages and hosts that get a figure of their own, at most."""
BINS = 60


class Fit(NamedTuple):
    """How well own and other captions are told apart in a group of rows."""

    group: str
    rows: int
    auc: float
    low: float
    high: float
    """Limits of the 95% interval of the AUC."""
    overlap: float
    """Common area of the two distributions of scores, 0 to 1."""

    @property
    def word(self) -> str:
        """How well, by the lower limit: not at all, poorly, fairly, well."""
        if self.low < 0.6:
            return "not at all"
        return "poorly" if self.low < 0.7 else "fairly" if self.low < 0.8 else "well"

    def __str__(self) -> str:
        said = f"tells matching captions from others {self.word}"
        return f"{said}: AUC {self.auc:.3f} [{self.low:.3f}, {self.high:.3f}], overlap {self.overlap:.0%}"


class Fitness(NamedTuple):
    """The result for one pair of embedding columns of a run."""

    score: str
    """The column of scores that the vectors belong to."""
    fits: list[Fit]
    """All rows first; then languages and hosts with enough of them."""
    edges: np.ndarray
    own: np.ndarray
    other: np.ndarray
    """Histograms of the scores with own and with other captions, as densities between the BINS + 1 edges."""


def measure(run: Run) -> list[Fitness]:
    """The fitness of each model whose picture and caption vectors a run has stored; empty if there is none.

    Reads at most SAMPLE rows of UNITS units, among those that the model scored. Deterministic.
    """
    return [found for step in run.steps for found in _of_step(run, step.label, list(step.adds))]


def _of_step(run: Run, label: str, adds: list[str]) -> Iterator[Fitness]:
    for column in adds:
        if not (match := re.fullmatch(r"(.*)image_embedding", column)) or f"{match[1]}text_embedding" not in adds:
            continue
        score = match[1].removesuffix("_") or "clip_score"
        pictures, captions, groups = _sample(run, label, column, f"{match[1]}text_embedding")
        if len(pictures) >= LEAST:
            yield _fitness(score, pictures, captions, groups)


def _sample(run: Run, label: str, image: str, text: str) -> tuple[np.ndarray, np.ndarray, dict[str, np.ndarray]]:
    """Unit vectors of pictures and captions, and the language, host, caption and picture of each row."""
    chosen = run.spread_units(UNITS)
    light = [c for c in ("uid", "url", "caption", "sha256", "language") if c in run.columns(label)]
    share = -(-SAMPLE // len(chosen))
    pictures, captions, texts = [], [], {c: [] for c in light}  # type: ignore[var-annotated]
    for unit in chosen:
        (rows,) = run.scan(light, after=label, units=[unit])
        order = np.argsort(hash64(rows["uid"], purpose="fitness"))[:share]
        rows = rows.take(np.sort(order))
        if not len(rows):
            continue
        vectors = run.take(unit, rows["row"].to_numpy(), [image, text])
        there = embeddings.finite(vectors[image]) & embeddings.finite(vectors[text])
        vectors, rows = vectors.filter(there), rows.filter(there)
        pictures.append(embeddings.unit(embeddings.matrix(vectors[image])))
        captions.append(embeddings.unit(embeddings.matrix(vectors[text])))
        for c in light:
            texts[c] += pc.fill_null(rows[c].cast("string"), "").to_pylist()
    if not pictures:
        return np.empty((0, 1)), np.empty((0, 1)), {}
    found = pc.fill_null(hosts(pa.array(texts["url"], pa.string())), "").to_pylist()
    columns = {"language": texts.get("language", []), "host": found, "caption": texts["caption"]}
    columns["picture"] = texts.get("sha256", texts["uid"])
    return np.concatenate(pictures), np.concatenate(captions), {k: np.array(v, object) for k, v in columns.items() if v}


def _fitness(score: str, pictures: np.ndarray, captions: np.ndarray, columns: dict[str, np.ndarray]) -> Fitness:
    n = len(pictures)
    own = np.einsum("nd,nd->n", pictures, captions)
    rng = np.random.default_rng(0)
    shifts = rng.choice(np.arange(1, n), min(OTHERS, n - 1), replace=False)
    other = np.stack([np.einsum("nd,nd->n", pictures, np.roll(captions, -s, axis=0)) for s in shifts], axis=1)
    same = np.zeros(other.shape, bool)
    for column in ("caption", "picture"):  # the caption of a copy does not count as another
        values = columns[column]
        same |= np.stack([values == np.roll(values, -s) for s in shifts], axis=1)
    other[same] = np.nan
    fits = [_fit("all rows", own, other)]
    for column in ("language", "host"):
        if column not in columns:
            continue
        common = Counter(columns[column].tolist()).most_common(GROUPS)
        if len(common) > 1:
            groups = [(name, columns[column] == name) for name, rows in common if name and rows >= LEAST]
            fits += [_fit(f"{column} {name}", own[rows], other[rows]) for name, rows in groups]
    values = other[np.isfinite(other)]
    low, high = min(own.min(), values.min()), max(own.max(), values.max())
    edges = np.linspace(low, high + 1e-6, BINS + 1)
    one, two = (np.histogram(of, edges, density=True)[0] for of in (own, values))
    return Fitness(score, fits, edges, one, two)


def _fit(group: str, own: np.ndarray, other: np.ndarray) -> Fit:
    """`own` (n,) and `other` (n, k), NaN where there is none."""
    values = np.sort(other[np.isfinite(other)])
    mine = np.sort(own)
    # How many of the others each own score exceeds, and the reverse; a tie counts half (Mann and Whitney).
    above = (np.searchsorted(values, own, "left") + np.searchsorted(values, own, "right")) / (2 * len(values))
    below = 1 - (np.searchsorted(mine, values, "left") + np.searchsorted(mine, values, "right")) / (2 * len(mine))
    auc = float(above.mean())
    # The other scores of a picture are not independent, so each picture counts once there too.
    deviation = (above.var(ddof=1) / len(own) + below.var(ddof=1) / len(own)) ** 0.5
    edges = np.linspace(min(mine[0], values[0]), max(mine[-1], values[-1]) + 1e-6, BINS + 1)
    one, two = np.histogram(mine, edges)[0] / len(mine), np.histogram(values, edges)[0] / len(values)
    overlap = float(np.minimum(one, two).sum())
    return Fit(group, len(own), auc, max(0.0, auc - 1.96 * deviation), min(1.0, auc + 1.96 * deviation), overlap)
