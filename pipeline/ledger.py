"""The books: rows in, rows kept, rows dropped by reason, for every step of every unit and of the whole run.

A `Funnel` is small and additive, so the books of a run are the sum of the books of its units, and driver memory
does not grow with the pool. `balance` is the check that no row was lost on the way.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa


class BooksError(Exception):
    """Rows were lost or invented: rows in differs from rows kept plus rows dropped."""


@dataclass
class Line:
    """What one step did."""

    rows_in: int = 0
    dropped: dict[str, int] = field(default_factory=dict)
    seconds: float = 0.0

    @property
    def kept(self) -> int:
        return self.rows_in - sum(self.dropped.values())


@dataclass
class Funnel:
    """The lines of consecutive steps, in the order of the recipe."""

    lines: dict[str, Line] = field(default_factory=dict)

    @classmethod
    def of(cls, labels: Iterable[str], rows_in: int, drops: Iterable[pa.Table], seconds: dict[str, float]) -> Funnel:
        """The books of a unit, from the rows that came in and the drop tables (`schema.DROP`) of its steps."""
        funnel = cls({label: Line(seconds=seconds.get(label, 0.0)) for label in labels})
        for table in drops:
            for group in table.group_by(["step", "reason"]).aggregate([([], "count_all")]).to_pylist():
                reasons = funnel.lines[group["step"]].dropped
                reasons[group["reason"]] = reasons.get(group["reason"], 0) + group["count_all"]
        for line in funnel.lines.values():
            line.rows_in = rows_in
            line.dropped = dict(sorted(line.dropped.items()))
            rows_in = line.kept
        return funnel

    @classmethod
    def from_json(cls, lines: list[dict[str, Any]]) -> Funnel:
        return cls({d["step"]: Line(d["rows_in"], dict(d["dropped"]), d["seconds"]) for d in lines})

    def to_json(self) -> list[dict[str, Any]]:
        """As in `funnel.json`: a list of `step, rows_in, kept, dropped: {reason: n}, seconds`."""
        return [
            {
                "step": label,
                "rows_in": line.rows_in,
                "kept": line.kept,
                "dropped": line.dropped,
                "seconds": round(line.seconds, 3),
            }
            for label, line in self.lines.items()
        ]

    def add(self, other: Funnel) -> None:
        """Adds the books of more rows, or of further steps."""
        for label, theirs in other.lines.items():
            ours = self.lines.setdefault(label, Line())
            ours.rows_in += theirs.rows_in
            ours.seconds += theirs.seconds
            for reason, n in theirs.dropped.items():
                ours.dropped[reason] = ours.dropped.get(reason, 0) + n
            ours.dropped = dict(sorted(ours.dropped.items()))

    @property
    def rows_in(self) -> int:
        return next(iter(self.lines.values())).rows_in if self.lines else 0

    @property
    def kept(self) -> int:
        return list(self.lines.values())[-1].kept if self.lines else 0

    def balance(self) -> None:
        """Every step starts with exactly the rows that the one before it kept; raises BooksError otherwise."""
        before: tuple[str, Line] | None = None
        for label, line in self.lines.items():
            if before and before[1].kept != line.rows_in:
                raise BooksError(f"{before[0]} kept {before[1].kept:,} rows, but {label} saw {line.rows_in:,}")
            before = label, line
