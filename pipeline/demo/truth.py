"""Evaluates a curation of the demo web: how much of each kind of noise it dropped, and how many good rows it lost.

    python -m pipeline.demo.truth RUN WEB                  what the run kept and dropped
    python -m pipeline.demo.truth RUN WEB STUDY.yaml       what each cut of a study of the run would keep

Compares with `WEB/truth/truth.parquet`.
"""

from __future__ import annotations

import sys
import tempfile
from collections import Counter, defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from rich.table import Table

from pipeline.demo.web import KINDS
from pipeline.reader import open_run
from trainer.terminal import Console

Pair = tuple[str, str]
Drop = tuple[str, str]
"""(step, reason)."""
DEDUPLICATION = ("exact_dedup", "near_dedup")
# Rows dropped by balancing are good but redundant, so they count neither as caught nor as lost.
THINNING = ("balance",)


@dataclass(frozen=True)
class KindScore:
    """The result for one kind of row. `recall` is the share dropped for noise, the share kept for good rows.

    `caught_by` is the step and reason that dropped most of a kind of noise. `precision` is the share of noise of any
    kind among all rows dropped for it. Both are None for good rows and if nothing was dropped.
    """

    kind: str
    good: bool
    rows: int
    kept: int
    thinned: int
    recall: float
    caught_by: Drop | None
    precision: float | None


@dataclass(frozen=True)
class Score:
    kinds: list[KindScore]
    precision: float
    """Share of good rows among the rows kept."""
    recall: float
    """Share of good rows that were kept, not counting those dropped by balancing."""


def judge(truth: list[dict[str, Any]], kept: set[Pair], drops: dict[Pair, Drop]) -> Score:
    """Compares outcomes with the truth: rows of `url, caption, kind, good, picture`.

    Rows with the same picture are interchangeable: if a copy was kept instead of its original, their outcomes are
    swapped before counting. Raises ValueError if a row of the truth is neither kept nor dropped, or both.
    """
    for row in truth:
        pair = (row["url"], row["caption"])
        if (pair in kept) == (pair in drops):
            raise ValueError(
                f"the row {pair} is {'both kept and dropped' if pair in kept else 'neither kept nor dropped'}"
            )
    outcomes = _outcomes(truth, kept, drops)

    by_drop: Counter[Drop] = Counter(drop for drop in outcomes if drop)
    noise_by_drop: Counter[Drop] = Counter(drop for row, drop in zip(truth, outcomes) if drop and not row["good"])
    kinds = []
    for kind in dict.fromkeys(row["kind"] for row in truth):
        of_kind = [drop for row, drop in zip(truth, outcomes) if row["kind"] == kind]
        good = next(row["good"] for row in truth if row["kind"] == kind)
        stayed = of_kind.count(None)
        thinned = sum(drop is not None and _step(drop) in THINNING for drop in of_kind)
        if good:
            most, precision, recall = None, None, _share(stayed, len(of_kind) - thinned)
        else:
            most = Counter(drop for drop in of_kind if drop).most_common(1)[0][0] if stayed < len(of_kind) else None
            precision = _share(noise_by_drop[most], by_drop[most]) if most else None
            recall = _share(len(of_kind) - stayed, len(of_kind))
        kinds.append(KindScore(kind, good, len(of_kind), stayed, thinned, recall, most, precision))
    good_kinds = [score for score in kinds if score.good]
    good_kept = sum(score.kept for score in good_kinds)
    return Score(
        kinds,
        precision=_share(good_kept, sum(score.kept for score in kinds)),
        recall=_share(good_kept, sum(score.rows - score.thinned for score in good_kinds)),
    )


def judge_cuts(truth: list[dict[str, Any]], candidates: list[Pair], kept: np.ndarray) -> list[tuple[float, float]]:
    """Precision and recall of cuts. `kept` says which of the candidates each cut keeps: bool (cuts, candidates).

    Precision is the share of good rows among those kept, recall the share kept of the good candidates.
    """
    good = good_candidates(truth, candidates)
    return [
        (_share(int(good[cut].sum()), int(cut.sum())), _share(int(good[cut].sum()), int(good.sum()))) for cut in kept
    ]


def good_candidates(truth: list[dict[str, Any]], candidates: list[Pair]) -> np.ndarray:
    """Marks the good candidates, bool: good rows, and copies of a good row that is not itself a candidate."""
    known = {(row["url"], row["caption"]): row for row in truth}
    present = {known[pair]["picture"] for pair in candidates if known[pair]["good"]}
    originals = {row["picture"] for row in truth if row["good"]} - present
    return np.array([known[pair]["good"] or known[pair]["picture"] in originals for pair in candidates], bool)


def _outcomes(truth: list[dict[str, Any]], kept: set[Pair], drops: dict[Pair, Drop]) -> list[Drop | None]:
    """The drop of each row, None if kept. An original and the copy kept in its place swap outcomes."""
    outcomes = [drops.get((row["url"], row["caption"])) for row in truth]
    rows_of: defaultdict[int, list[int]] = defaultdict(list)
    for position, row in enumerate(truth):
        rows_of[row["picture"]].append(position)

    def distance(position: int) -> int:
        drop = outcomes[position]
        return 2 if drop is None else int(_step(drop) not in DEDUPLICATION)

    for positions in rows_of.values():
        original = next((p for p in positions if truth[p]["good"]), None)
        if original is not None:
            furthest = max(positions, key=lambda p: (distance(p), p == original))
            outcomes[original], outcomes[furthest] = outcomes[furthest], outcomes[original]
    return outcomes


def _step(drop: Drop) -> str:
    return drop[0].partition(".")[0]  # recipes number repeated steps: exact_dedup.2


def _share(part: int, whole: int) -> float:
    return part / whole if whole else 1.0


def read(run: Path, web: Path) -> tuple[list[dict[str, Any]], set[Pair], dict[Pair, Drop]]:
    """The arguments of `judge` for a finished run on the web in `web`."""
    truth = by_kind(pq.read_table(web / "truth" / "truth.parquet").to_pylist())
    opened = open_run(run)
    kept = {pair for table in opened.scan(["url", "caption"]) for pair in _pairs(table)}
    drops = {
        pair: drop
        for table in opened.drops()
        for pair, drop in zip(_pairs(table), zip(table["step"].to_pylist(), table["reason"].to_pylist()))
    }
    return truth, kept, drops


def by_kind(truth: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Sorts rows by kind: first in the order of `KINDS`, then kinds of other webs by name."""
    order = {kind: number for number, kind in enumerate(KINDS)}
    return sorted(truth, key=lambda row: (order.get(row["kind"], len(order)), row["kind"]))


def _pairs(table: pa.Table) -> list[Pair]:
    return list(zip(table["url"].to_pylist(), table["caption"].to_pylist()))


def show(score: Score, console: Console) -> None:
    table = Table(title="Curation against the truth", title_justify="left", caption_justify="left")
    for name in ("kind of row", "rows", "kept", "recall", "caught by", "precision"):
        table.add_column(name, justify="left" if name in ("kind of row", "caught by") else "right", no_wrap=True)
    for good, heading in ((True, "good: should be kept"), (False, "noise: should be dropped")):
        table.add_row(f"[bold]{heading}[/bold]")
        for kind in score.kinds:
            if kind.good == good:
                caught = ": ".join(kind.caught_by) if kind.caught_by else ""
                precision = "" if kind.precision is None else f"{kind.precision:.3f}"
                cells = (str(kind.rows), str(kind.kept), f"{kind.recall:.3f}", caught, precision)
                table.add_row(f"  {kind.kind}", *cells)
        table.add_section()
    console.print(table)
    console.print(
        "recall: share of good rows kept (balancing aside) or of noise dropped; precision: share of noise among rows\n"
        "dropped by that step for that reason. A copy kept instead of its original counts as the original."
    )
    console.print(f"kept set: precision [bold]{score.precision:.3f}[/bold], recall [bold]{score.recall:.3f}[/bold]")


def show_cuts(run: Path, web: Path, study: str, console: Console) -> None:
    """Prints precision and recall of each cut of a study."""
    from pipeline.studio.cuts import default_step
    from pipeline.study.candidates import open_candidates
    from pipeline.study.kept import Cuts
    from pipeline.study.study_plan import load

    plan, opened = load(study), open_run(run)
    after = plan.after or default_step(opened)
    columns = list(dict.fromkeys(condition.column for cut in plan.cuts for condition in cut.conditions))
    with tempfile.TemporaryDirectory() as folder:
        candidates = open_candidates(opened, after, columns, Path(folder) / "candidates")
        kept = Cuts(candidates, plan.cuts).kept(slice(0, len(candidates)))
    pairs = [pair for rows in opened.scan(["url", "caption"], after=after) for pair in _pairs(rows)]
    truth = pq.read_table(web / "truth" / "truth.parquet").to_pylist()
    table = Table(title=f"Cuts of {len(pairs):,} candidates against the truth", title_justify="left")
    for name in ("cut", "rows", "precision", "recall"):
        table.add_column(name, justify="left" if name == "cut" else "right")
    for cut, mask, (precision, recall) in zip(plan.cuts, kept, judge_cuts(truth, pairs, kept)):
        table.add_row(str(cut), f"{mask.sum():,}", f"{precision:.3f}", f"{recall:.3f}")
    console.print(table)


def main() -> None:
    if len(sys.argv) not in (3, 4):
        raise SystemExit(__doc__)
    run, web, *study = sys.argv[1:]
    if study:
        show_cuts(Path(run), Path(web), study[0], Console())
    else:
        show(judge(*read(Path(run), Path(web))), Console())


if __name__ == "__main__":
    main()
