"""Answers the requests of the studio's page about the rows of a run."""

from __future__ import annotations

import argparse
import csv
import functools
import io
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pyarrow as pa
import yaml
from pydantic import BaseModel, ConfigDict, Field, model_validator

from pipeline import page
from pipeline.condition import Condition
from pipeline.reader import Run, RunError, RunStep
from pipeline.recipe import line_text
from pipeline.similarity.embeddings import matrix
from pipeline.storage import Store
from pipeline.studio.cuts import View, as_cut, first, load, vector_columns

LABELS = "report/labels.csv"
TILES = 24
"""Most rows in each group of an answer."""
BLOCK = 65_536
"""Embeddings converted to float32 at a time in a search."""
PICTURES = 2000
"""Most encoded pictures kept in memory."""


class Asked(BaseModel):
    """A request of the page; unknown keys and non-finite numbers are refused."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)


class CutAsked(Asked):
    """A cut, as the page sends it."""

    column: str
    min: float | None = None
    top_fraction: float | None = Field(None, gt=0, le=1)

    @model_validator(mode="after")
    def _one(self) -> CutAsked:
        if (self.min is None) == (self.top_fraction is None):
            raise ValueError("exactly one of min and top_fraction must be given")
        return self

    def condition(self) -> Condition:
        """The cut as a condition."""
        rule = "top_fraction" if self.min is None else "min"
        return Condition(self.column, rule, getattr(self, rule))


class ViewAsked(Asked):
    """A view, as the page sends it."""

    language: str = Field(default="", max_length=1000)
    host: str = Field(default="", max_length=1000)
    concept: str = Field(default="", max_length=1000)
    text: str = Field(default="", max_length=1000)


class Question(Asked):
    """The request for counts, rows or a recipe: the cuts, the view and what to show."""

    cuts: list[CutAsked] = Field(default=[], max_length=64)
    view: ViewAsked = ViewAsked()
    columns: list[str] = Field(default=[], max_length=256)
    """Scores to make histograms of."""
    show: str | int = "sample"
    """The rows to show: `sample`, `search`, or the number of a cut."""
    text: str = Field(default="", max_length=1000)
    """What to search for: a description of the picture."""
    like: int | None = None
    """What to search for: pictures similar to that of this row."""


class LabelAsked(Asked):
    """A mark on a row: 1 for good, 0 for bad, null to remove it."""

    id: int
    label: int | None = Field(ge=0, le=1)


class Studio:
    """A run in memory, and the answers about it. Its methods are called from several threads."""

    def __init__(self, run: Run, after: str, folder: str, progress: Callable[[int], None] = lambda units: None) -> None:
        self.run, self.after, self._folder = run, after, folder
        self.rows = load(run, after, folder, progress)
        self.labels = read_labels(Store(run.path))
        self._lock = threading.Lock()
        self._vectors: np.ndarray | None = None
        columns = vector_columns(run.columns(after))
        self.vector = columns[0] if columns else None
        self._has_pictures = any("image" in step.adds for step in run.steps)
        self.picture = functools.lru_cache(PICTURES)(self._picture)
        self.ranking = functools.lru_cache(8)(self._ranking)

    # --- Answers ------------------------------------------------------------------------------------------------------

    def start(self) -> dict[str, Any]:
        """Everything that the page needs to start."""
        rows, model = self.rows, self.text_model()
        searches = {
            (True, True): "",
            (True, False): "The model that made the embeddings is not a local folder or file, so text cannot be "
            "embedded here. Search by picture instead.",
            (False, False): "The run has no embeddings (clip_score: {embeddings: true} stores them).",
        }
        return {
            "name": self.run.name,
            "path": self.run.path,
            "after": self.after,
            "rows": rows.n,
            "scores": [
                {"name": name, "low": low, "high": high, "present": len(rows.order[name])}
                for name, (low, high) in rows.ranges.items()
            ],
            "cuts": [
                {"column": cut.column, "min": None, "top_fraction": None, cut.rule: cut.value}
                for cut in cuts_after(self.run, self.after)
                if cut.column in rows.scores
            ],
            "later": [step.label for step in later_steps(self.run, self.after)],
            "has_languages": "languages" in rows.groups,
            "has_concepts": "concepts" in rows.groups,
            "has_pictures": self._has_pictures,
            "search": {
                "picture": self.vector is not None,
                "text": model is not None,
                "why": searches[self.vector is not None, model is not None],
            },
            "labels": len(self.labels),
            "labels_path": f"{self.run.path}/{LABELS}",
        }

    def summary(self, asked: Question) -> dict[str, Any]:
        """Counts and histograms."""
        cuts, view = self._cuts(asked), self._view(asked)
        unknown = [name for name in asked.columns if name not in self.rows.scores]
        if unknown:
            raise ValueError(f"no score {unknown[0]!r}")
        return self.rows.summary(cuts, view, asked.columns)

    def tiles(self, asked: Question) -> dict[str, Any]:
        """One or two groups of rows, by name."""
        cuts, view, rows = self._cuts(asked), self._view(asked), self.rows
        if asked.show == "sample":
            groups = {"kept": rows.sample(cuts, view, True, TILES), "dropped": rows.sample(cuts, view, False, TILES)}
        elif asked.show == "search":
            groups = {"found": first(self.ranking(asked.text, asked.like), rows.seen(view), TILES)}
        else:
            number = int(asked.show)
            if not 0 <= number < len(cuts):
                raise ValueError(f"there is no cut {number}")
            above, below = rows.sides(cuts, number, view, TILES // 2)
            groups = {"above": above, "below": below}
        return {name: [self._tile(row) for row in rows.describe(found, cuts)] for name, found in groups.items()}

    def label(self, asked: LabelAsked) -> dict[str, Any]:
        """Stores a mark."""
        if not 0 <= asked.id < self.rows.n:
            raise ValueError(f"there is no row {asked.id}")
        uid = self.rows.texts["uid"][asked.id].as_py()
        with self._lock:
            store = Store(self.run.path)
            labels = read_labels(store)  # read again: another studio may have added marks
            labels.pop(uid, None)
            if asked.label is not None:
                labels[uid] = asked.label
            write_labels(store, labels)
            self.labels = labels
        return {"labels": len(labels)}

    def export(self, asked: Question) -> dict[str, Any]:
        """The cuts as recipe lines, and the whole recipe with these lines in place."""
        cuts = self._cuts(asked)
        lines = "".join(f"  - {line_text(cut.line())}\n" for cut in cuts)
        return {"lines": lines, "recipe": recipe_with(self.run, self.after, cuts), "after": self.after}

    def _cuts(self, asked: Question) -> tuple[Condition, ...]:
        for cut in asked.cuts:
            if cut.column not in self.rows.scores:
                raise ValueError(f"no score {cut.column!r}")
        return tuple(cut.condition() for cut in asked.cuts)

    def _view(self, asked: Question) -> View:
        return View(**asked.view.model_dump())

    def _tile(self, row: dict[str, Any]) -> dict[str, Any]:
        return {
            **row,
            "uid": page.plain(row["uid"]),
            "url": page.plain(row["url"])[: page.TEXT],
            "caption": page.plain((row["caption"] or "")[: page.LONGEST])[: page.TEXT],
            "label": self.labels.get(row["uid"]),
        }

    def _picture(self, row: int) -> bytes | None:
        if not self._has_pictures:
            return None
        unit, number = self.rows.place[row].tolist()
        found: bytes | None = self.run.take(unit, [number], ["image"])["image"][0].as_py()
        return found

    # --- Search by meaning --------------------------------------------------------------------------------------------

    def text_model(self) -> RunStep | None:
        """The step that made the embeddings, if its model embeds texts too and is on this machine."""
        if self.vector is None:
            return None
        step = next(step for step in self.run.steps if self.vector in step.adds)
        model, weights = step.options.get("model"), step.options.get("pretrained")
        local = bool(model) and (Path(str(model)).is_dir() or (bool(weights) and Path(str(weights)).is_file()))
        return step if local and "text" not in str(self.vector) else None

    def _ranking(self, text: str, like: int | None) -> np.ndarray:
        """The rows that have an embedding, from the most to the least similar to a text or to a row's picture."""
        vectors = self._embeddings()
        if like is not None:
            if not 0 <= like < self.rows.n:
                raise ValueError(f"there is no row {like}")
            query = vectors[like].astype(np.float32)
        else:
            query = self._encoder().texts([text])[0].cpu().numpy()
            if len(query) != vectors.shape[1]:
                raise ValueError(f"the model gives {len(query)} dimensions, but {self.vector} has {vectors.shape[1]}")
        blocks = (vectors[low : low + BLOCK].astype(np.float32) for low in range(0, len(vectors), BLOCK))
        scores = np.concatenate([np.where(block.any(axis=1), block @ query, -np.inf) for block in blocks])
        return np.argsort(-scores, kind="stable")[: int(np.isfinite(scores).sum())]

    def _embeddings(self) -> np.ndarray:
        """The embeddings of all rows, float16 (n, d), zeros for rows without one; mapped; read on first use."""
        if self.vector is None:
            raise ValueError("the run has no embeddings")
        with self._lock:
            if self._vectors is None:
                size = self.run.columns(self.after)[self.vector].list_size
                shape = (max(1, self.rows.n), size)
                vectors = np.lib.format.open_memmap(f"{self._folder}/vectors.npy", "w+", np.float16, shape)
                at = 0
                for table in self.run.scan([self.vector], self.after):
                    column = table[self.vector]
                    valid = pa.compute.is_valid(column)
                    vectors[at : at + len(table)][valid.to_numpy()] = np.nan_to_num(matrix(column.filter(valid)))
                    at += len(table)
                self._vectors = vectors
        return self._vectors

    @functools.cached_property
    def _encode(self) -> Any:
        from trainer.command import open_encoder

        step = self.text_model()
        if step is None:
            raise ValueError("the model that made the embeddings is not on this machine")
        options = step.options
        named = SimpleNamespace(
            model=options["model"], pretrained=options.get("pretrained"), batch_size=1, device="cpu", precision="fp32"
        )
        return open_encoder(cast(argparse.Namespace, named))

    def _encoder(self) -> Any:
        with self._lock:
            return self._encode


def read_labels(store: Store) -> dict[str, int]:
    """Reads the marks of a run, by uid: 1 for good and 0 for bad. Raises RunError if the file has another form."""
    data = store.read_if_there(LABELS)
    if data is None:
        return {}
    try:
        rows = list(csv.reader(io.StringIO(data.decode())))
        if not rows or rows[0] != ["uid", "label"]:
            raise ValueError
        return {uid: {"0": 0, "1": 1}[label] for uid, label in rows[1:]}
    except (ValueError, KeyError):
        raise RunError(
            f"{store.path(LABELS)}: expected the header uid,label and labels 0 or 1; move it away to start over"
        ) from None


def write_labels(store: Store, labels: dict[str, int]) -> None:
    """Writes the marks of a run, in the order they were made."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerows([("uid", "label"), *labels.items()])
    store.write(LABELS, out.getvalue().encode())


def cuts_after(run: Run, after: str) -> list[Condition]:
    """The uninterrupted cuts that follow a step."""
    cuts = []
    for step in run.steps[_number(run, after) + 1 :]:
        if (cut := as_cut(step)) is None:
            break
        cuts.append(cut)
    return cuts


def later_steps(run: Run, after: str) -> list[RunStep]:
    """The steps after those cuts."""
    return run.steps[_number(run, after) + 1 + len(cuts_after(run, after)) :]


def recipe_with(run: Run, after: str, cuts: Sequence[Condition]) -> str:
    """The recipe of a run as YAML, with these cuts in place of those that follow a step."""
    at = _number(run, after)  # the pool is step 0 and has no line
    lines = run.recipe["steps"]
    steps = [*lines[:at], *(cut.line() for cut in cuts), *lines[at + len(cuts_after(run, after)) :]]
    rest = {key: value for key, value in run.recipe.items() if key != "steps" and value is not None}
    head = yaml.safe_dump(rest, sort_keys=False, allow_unicode=True, width=1 << 30)
    body = "".join(f"  - {line_text(step)}\n" for step in steps)
    return f"# Relative paths are those of the folder where the run was made.\n{head}steps:\n{body}"


def _number(run: Run, label: str) -> int:
    return next(i for i, step in enumerate(run.steps) if step.label == label)
