"""Builds the sections of the report: most functions turn a run into the charts and tables of one section."""

from __future__ import annotations

import contextlib
import math
import os
import platform
import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from importlib import metadata
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline import page
from pipeline.fetch import reasons
from pipeline.ledger import Line
from pipeline.page import CUT, DROPPED, KEPT, OTHER, SERIES, Picture, Table, Thumbnails, chart, count, share
from pipeline.reader import Run, RunStep
from pipeline.report import fitness
from pipeline.report.histogram import Histogram, Nearest, NotedRow, Tally
from pipeline.report.limits import Limit, pass_limits, spell
from pipeline.scheduler.progress import clock
from pipeline.schema import is_number, numbers
from pipeline.text.hashing import hash64
from pipeline.text.url import hosts as hosts_of

DOZEN = 12
"""Most pictures from each side of a cut, and of the random rows that a step dropped."""
MOST_HOSTS = 100_000
"""Distinct hosts counted; beyond that, the rarest half is forgotten."""
_DIGEST = re.compile(r"\b([0-9a-f]{8})[0-9a-f]{24,}\b")


@dataclass
class Judged:
    """What a step kept and dropped, on both sides of its cut."""

    step: RunStep
    line: Line
    column: str | None = None
    """The numeric column that the step compares, if its values are stored."""
    kept: Histogram = field(default_factory=Histogram)
    dropped: Histogram = field(default_factory=Histogram)
    """Histograms of the numbers that decided."""
    cuts: list[float] = field(default_factory=list)
    above: Nearest = field(default_factory=lambda: Nearest(DOZEN))
    below: Nearest = field(default_factory=lambda: Nearest(DOZEN))
    """The kept and the dropped rows nearest to a cut."""
    random: Nearest = field(default_factory=lambda: Nearest(DOZEN))
    """A random sample of the dropped rows."""


def judge(run: Run, step: RunStep, line: Line, picture_units: set[int], lost: Tally) -> Judged:
    """Reads what a step dropped, and what it kept if it compares a stored number.

    Rows to show are taken from `picture_units`; `lost` counts the hosts of the dropped rows.
    """
    judged, name, column = Judged(step, line), step.label.partition(".")[0], step.options.get("column")
    dtype = run.columns(step.label).get(column) if isinstance(column, str) else None
    compares = dtype is not None and is_number(dtype)  # `balance` names a column of lists
    bounds = [step.options.get(key) for key in ("min", "max") if compares]
    judged.cuts = [float(bound) for bound in bounds if isinstance(bound, int | float)]

    def distance(values: np.ndarray, side: int) -> np.ndarray:
        """The distance to the nearest cut. A cut that is not given lies below (1) or above (-1) all values."""
        cuts = judged.cuts
        distances = np.abs(np.subtract.outer(values, cuts)).min(axis=1) if cuts else side * values
        return np.where(np.isfinite(values), distances, np.inf)

    for table in run.drops(step.label):
        if not len(table):
            continue
        values = numbers(table["value"])
        judged.dropped.add(values)
        lost.add(url_hosts(table["url"]))
        if table["unit"][0].as_py() in picture_units:
            notes = [
                _short(" ".join(text for text in (reason if reason != name or not detail else "", detail) if text))
                for reason, detail in zip(table["reason"].to_pylist(), table["detail"].to_pylist())
            ]
            judged.random.add(hash64(table["uid"], purpose="report").astype(np.float64), table, notes)
            judged.below.add(distance(values, -1), table, notes)
    if not compares or not judged.dropped.total:
        return judged
    judged.column, lowest = str(column), math.inf
    for table in run.scan(judged.column, after=step.label):
        values = numbers(table[judged.column])
        judged.kept.add(values)
        lowest = min(lowest, float(np.nanmin(values, initial=math.inf)))
        if len(table) and table["unit"][0].as_py() in picture_units:
            judged.above.add(distance(values, 1), table, [f"{v:.4g}" for v in values])
    judged.cuts = judged.cuts or [lowest]
    return judged


def url_hosts(urls: pa.ChunkedArray) -> pa.ChunkedArray:
    """The hosts of URLs; empty text for a URL without one."""
    return pc.fill_null(hosts_of(urls), "")


def _first_with(run: Run, *columns: str) -> str | None:
    """The first step after which these columns can all be read; None if there is none."""
    return next((step.label for step in run.steps if set(columns) <= run.columns(step.label).keys()), None)


def facts(run: Run) -> list[tuple[str, str]]:
    """The numbers at the top of the page, with what they count."""
    seconds = sum(line.seconds for line in run.funnel.lines.values())
    return [
        (count(run.rows_in), "rows in the pool"),
        (count(run.kept), "kept"),
        (share(run.kept, run.rows_in), "of the pool"),
        (count(run.rows_in - run.kept), "dropped, each with its reason"),
        (count(len(run.steps) - 1), "steps"),
        (clock(seconds), "of work, all workers together"),
    ]


def funnel(run: Run) -> dict[str, object]:
    """The rows that each step kept and dropped: `chart` and `table`."""
    lines = list(run.funnel.lines.items())
    picture_bytes = _bytes_after(run)
    values: list[dict[str, object]] = []
    rows: list[list[object]] = []
    for label, line in lines:
        values += [
            {"step": label, "rows": line.kept, "is": "kept"},
            {"step": label, "rows": sum(line.dropped.values()), "is": "dropped here"},
        ]
        rate = line.rows_in / line.seconds if line.seconds > 0 else None
        rows.append(
            [label, line.rows_in, line.kept, share(line.kept, line.rows_in), share(line.kept, run.rows_in),
             page.size(picture_bytes[label]) if label in picture_bytes else None, None if rate is None else round(rate),
             f"{line.seconds:,.1f}"]
        )  # fmt: skip
    spec = {
        "data": {"values": values},
        "mark": {"type": "bar", "cornerRadiusEnd": 2},
        "encoding": {
            "y": {"field": "step", "sort": [label for label, _ in lines], "title": None},
            "x": _quantity("rows", "rows"),
            "order": {"field": "is", "sort": "descending"},
            "color": {"field": "is", "scale": {"domain": ["kept", "dropped here"], "range": [KEPT, DROPPED]}},
        },
    }
    summary = f"Of {run.rows_in:,} rows, {run.kept:,} ({share(run.kept, run.rows_in)}) are kept."
    if lines:
        worst, line = max(lines, key=lambda item: sum(item[1].dropped.values()))
        summary += f" {worst} drops the most: {sum(line.dropped.values()):,}."
    columns = ["step", "rows in", "kept", "of these", "of the pool", "pictures", "rows/s", "seconds"]
    return {"chart": chart(spec, summary, height=26 * len(lines)), "table": Table(columns, rows)}


def _bytes_after(run: Run) -> dict[str, int]:
    """The bytes of the fetched pictures whose rows survived each step."""
    column = "original_bytes"
    labels = [step.label for step in run.steps]
    if (first := _first_with(run, column)) is None:
        return {}
    total, after = 0, {}
    for label in labels[labels.index(first) :]:
        if label == first or run.funnel.lines[label].dropped:
            total = sum(int(pc.sum(t[column]).as_py() or 0) for t in run.scan(column, after=label))
        after[label] = total
    return after


def shown_step(run: Run, judged: Judged, thumbnails: Thumbnails, pictured: bool) -> dict[str, object]:
    """The section of a step that dropped rows. Rows are shown with pictures if the run has any (`pictured`)."""
    line = judged.line
    chosen = [("just kept", judged.above), ("just dropped", judged.below)] if judged.column else []
    chosen.append(("a random dozen of the dropped rows", judged.random))
    sides: list[tuple[str, list[Picture] | Table]] = []
    for title, rows in chosen:
        items = _pictures(run, rows.rows(), thumbnails if pictured else None)
        if any(item.address for item in items):
            sides.append((title, items))
        elif items:
            lines = dict.fromkeys((item.caption, *item.notes) for item in items)  # one caption under many pictures
            sides.append((title, Table(["caption", "why"], list(lines))))
    dropped = sum(line.dropped.values())
    by_reason = sorted(line.dropped.items(), key=lambda item: (-item[1], item[0]))
    return {
        "label": judged.step.label,
        "said": f"{dropped:,} of {line.rows_in:,} rows dropped ({share(dropped, line.rows_in)}).",
        "reasons": Table(["reason", "rows", "share"], [[r, n, share(n, line.rows_in)] for r, n in by_reason]),
        "chart": _distribution(judged),
        "sides": sides,
    }


def _distribution(judged: Judged) -> object:
    """The histogram of what a step compared, or of the numbers that decided its drops; None with under four bars."""
    width = max(judged.kept.width, judged.dropped.width)
    values = [
        {"from": low, "to": high, "rows": n, "is": name}
        for name, histogram in (("dropped", judged.dropped), ("kept", judged.kept))
        for low, high, n in histogram.bars(width)
    ]
    if len({v["from"] for v in values if v["rows"]}) < 4:
        return None
    name = judged.column or "the number that decided"
    colours = {"kept": KEPT, "dropped": DROPPED} if judged.kept.total else {"dropped": DROPPED}
    layers: list[dict[str, object]] = [
        {
            "data": {"values": values},
            "mark": {"type": "bar", "binSpacing": 0.5, "opacity": 0.85},
            "encoding": {
                "x": _quantity("from", name, bin={"binned": True}, scale={"zero": False}),
                "x2": {"field": "to"},
                "y": _quantity("rows", "rows"),
                "color": {"field": "is", "scale": {"domain": [*colours], "range": [*colours.values()]}},
            },
        }
    ]
    cuts = [cut for cut in judged.cuts if math.isfinite(cut)]
    for cut in cuts:
        layers += _rule("x", cut, f"cut {cut:.4g}")
    summary = f"{name} of each dropped row"
    if judged.column:
        summary = f"{name}: {judged.kept.total:,} kept, {judged.dropped.total:,} dropped"
    if cuts:
        summary += f", cut at {' and '.join(f'{cut:.4g}' for cut in cuts)}"
    rows = [[f"{v['from']:.4g} to {v['to']:.4g}", v["is"], v["rows"]] for v in values]
    return chart({"layer": layers}, f"{summary}.", Table(["range", "rows that were", "rows"], rows))


def _quantity(field: str, title: str, **more: object) -> dict[str, object]:
    """The encoding of a numeric field of a chart."""
    return {"field": field, "type": "quantitative", "title": title, **more}


def _rule(axis: str, at: float, text: str) -> list[dict[str, object]]:
    """The layers that draw a labelled line across a chart at a value of an axis."""
    data = {"data": {"values": [{"at": at}]}}
    place: dict[str, object] = {axis: {"field": "at", "type": "quantitative"}}
    label = {"type": "text", "align": "left", "dx": 5, "dy": -2, "text": text, "color": CUT}
    label["baseline"] = "top" if axis == "x" else "bottom"
    return [
        {**data, "mark": {"type": "rule", "strokeWidth": 2}, "encoding": place},
        {**data, "mark": label, "encoding": {**place, "y" if axis == "x" else "x": {"value": 0}}},
    ]


def _short(text: str) -> str:
    """Shortens the digests in a text to their first eight digits, which are enough to tell them apart."""
    return _DIGEST.sub(r"\1…", text)


def _pictures(run: Run, rows: list[NotedRow], thumbnails: Thumbnails | None) -> list[Picture]:
    """The captions of rows and, given `thumbnails`, their pictures if fetched."""
    found: dict[tuple[int, int], dict[str, Any]] = {}
    for unit in sorted({row.unit for row in rows}):
        numbers = [row.row for row in rows if row.unit == unit]
        columns = ["caption", *(["image"] if thumbnails else [])]
        for values in run.take(unit, numbers, columns).to_pylist():
            found[unit, values["row"]] = values
    shown = []
    for row in rows:
        if (values := found.get((row.unit, row.row))) is not None:
            address = thumbnails(values.get("image")) if thumbnails else None
            shown.append(Picture(address, values["caption"], [row.note] if row.note else []))
    return shown


def failures(run: Run) -> Table | None:
    """Why downloads failed, and whether a retry may help; None if none failed."""
    rows: list[list[object]] = []
    for step in run.steps:
        line = run.funnel.lines.get(step.label)
        if line is None or not step.step.endswith(".Download"):
            continue
        for reason, n in sorted(line.dropped.items(), key=lambda item: -item[1]):
            known = reasons.find(reason)
            rows.append([reason, n, share(n, line.rows_in), "may help" if known.transient else "no",
                         known.meaning.replace("`", "")])  # fmt: skip
    return Table(["reason", "rows", "of those tried", "another try", "meaning"], rows) if rows else None


def hosts(every: Tally, lost: Tally) -> Table:
    """The hosts with most dropped rows, from counts of the rows of the pool and of the dropped ones."""
    rows = [
        [host or "(none)", total, n, share(n, total)]
        for host, n in lost.counts.most_common(20)
        if (total := every.counts[host])
    ]
    return Table(["host", "rows", "dropped", "share"], rows)


def languages(run: Run) -> object:
    """The languages of the captions that the language filter kept and dropped; None without one."""
    step = next((step for step in run.steps if "language" in step.adds), None)
    if step is None:
        return None
    counts: Counter[str] = Counter()
    for table in run.scan("language", after=_first_with(run, "language")):
        counts.update(table["language"].to_pylist())
    dropped: Counter[str] = Counter()
    for table in run.drops(step.label):
        dropped.update((detail or "").split(" ")[0].strip(":,") or "?" for detail in table["detail"].to_pylist())
    values = [{"language": k or "?", "rows": n, "is": "kept"} for k, n in counts.most_common(20)]
    values += [{"language": k, "rows": n, "is": "dropped"} for k, n in dropped.most_common(20)]
    most = max([*counts.values(), *dropped.values()], default=0)
    ticks = [0, *(10**digits for digits in range(len(str(most))))]
    spec = {
        "data": {"values": values},
        "mark": "bar",
        "encoding": {
            "y": {"field": "language", "sort": "-x", "title": None},
            "yOffset": {"field": "is"},
            "x": _quantity("rows", "rows (log)", scale={"type": "symlog"}, axis={"values": ticks}),
            "color": {"field": "is", "scale": {"domain": ["kept", "dropped"], "range": [KEPT, DROPPED]}},
        },
    }
    summary = (
        f"{step.label} kept {sum(counts.values()):,} captions and dropped {sum(dropped.values()):,}. The bars count "
        "captions by their most likely language."
    )
    wanted = step.options.get("keep")
    if wanted and (others := sum(n for name, n in counts.items() if name not in wanted)):
        summary += (
            f" {others:,} of the captions kept are most likely in a language that was not asked for, but the languages "
            "asked for are together likely enough (min_score)."
        )
    table = Table(["language", "rows that were", "rows"], [[v["language"], v["is"], v["rows"]] for v in values])
    return chart(spec, summary, table, height=24 * max(3, len({v["language"] for v in values})))


def duplicates(run: Run, picture_units: set[int], thumbnails: Thumbnails) -> Iterator[tuple[str, list[Picture]]]:
    """Yields the largest groups of duplicates: a title, then the row kept and rows dropped as its duplicates."""
    for step in run.steps:
        if step.step.rpartition(".")[2] not in ("NearDedup", "SemanticDedup") or step.label not in run.funnel.lines:
            continue
        groups: dict[str, list[NotedRow]] = defaultdict(list)
        for table in run.drops(step.label, units=sorted(picture_units)):
            for drop in table.select(["unit", "row", "detail"]).to_pylist():
                keeper = (drop["detail"] or "").split(" ")[0]
                if len(groups) < 4 * DOZEN or keeper in groups:
                    note = (drop["detail"] or "").removeprefix(keeper).lstrip(" ,;")
                    groups[keeper].append(NotedRow(drop["unit"], drop["row"], note))
        largest = sorted(groups.items(), key=lambda item: (-len(item[1]), item[0]))[: DOZEN // 2]
        kept = run.pictures([keeper for keeper, _ in largest])
        for keeper, rows in largest:
            first = Picture(thumbnails(kept.get(keeper)), "kept", [_short(keeper)])
            copies = f"{len(rows):,} {'copy' if len(rows) == 1 else 'copies'}"
            yield f"{step.label}: {copies}", [first, *_pictures(run, rows[:5], thumbnails)]


def concepts(run: Run) -> Iterator[object]:
    """Yields a chart for each `balance` step: captions per entry before and after it, the most frequent entry first."""
    for step in run.steps:
        figures = run.funnel.lines[step.label].figures if step.label in run.funnel.lines else []
        if not step.step.endswith(".Balance") or not figures:
            continue
        bins: dict[int, Counter[str]] = defaultdict(Counter)
        for figure in figures:
            bins[figure["at_least"]].update({key: figure[key] for key in ("entries", "matches", "kept")})
        values: list[dict[str, object]] = []
        rank = 1
        for _, sums in sorted(bins.items(), reverse=True):
            for when, matches in (("before", sums["matches"]), ("after", sums["kept"])):
                if matches:  # a log scale has no zero
                    mean = matches / sums["entries"]
                    values += [{"rank": at, "captions": mean, "is": when} for at in (rank, rank + sums["entries"])]
            rank += sums["entries"]
        caps = sorted({figure["cap"] for figure in figures})
        curve = {
            "transform": [{"filter": "datum.is == 'before'"}],
            "mark": {"type": "line", "strokeWidth": 7, "opacity": 0.4},  # both lines show where equal
            "encoding": {
                "x": _quantity("rank", "entries, the most frequent first", scale={"type": "log", "nice": False}),
                "y": _quantity("captions", "captions of an entry", scale={"type": "log"}),
                "color": {"field": "is", "scale": {"domain": ["before", "after"], "range": [OTHER, KEPT]}},
            },
        }
        after = {**curve, "transform": [{"filter": "datum.is == 'after'"}], "mark": "line"}
        curves = {"data": {"values": values}, "layer": [curve, after]}
        spec = {"layer": [curves, *(_rule("y", caps[0], f"cap {caps[0]:,}") if len(caps) == 1 else [])]}
        tail = [figure for figure in figures if 2 * figure["at_least"] <= figure["cap"]]
        before, after_it = (
            share(sum(figure[key] for figure in tail), sum(figure[key] for figure in figures))
            for key in ("matches", "kept")
        )
        summary = (
            f"{step.label}: captions that match each of {rank - 1:,} entries, before and after. The tail, entries well "
            f"below the cap, has {before} of all matches before and {after_it} after."
        )
        columns = ["captions of an entry", "entries", "matches before", "after", "share kept", "cap"]
        rows = [
            [f"{f['at_least']:,} to {2 * f['at_least'] - 1:,}", f["entries"], f["matches"], f["kept"],
             share(f["kept"], f["matches"]), f["cap"]]
            for f in figures
        ]  # fmt: skip
        if any(figure["language"] is not None for figure in figures):
            columns.insert(0, "language")
            rows = [[figure["language"] or "(none)", *row] for figure, row in zip(figures, rows)]
        yield chart(spec, summary, Table(columns, rows), width=560, height=240)


def sizes(run: Run) -> list[object]:
    """The sizes and shapes of the fetched pictures; empty if none were fetched."""
    sides = ("original_width", "original_height")
    if (label := _first_with(run, *sides)) is None:
        return []
    width, ratio = Histogram(), Histogram()
    for table in run.scan(sides, after=label):
        w, h = (numbers(table[side]) for side in sides)
        width.add(np.log2(np.maximum(np.minimum(w, h), 1)))
        ratio.add(np.log2(np.maximum(w, 1) / np.maximum(h, 1)))
    return [_log_histogram(width, "shorter side, pixels"), _log_histogram(ratio, "width / height")]


def _log_histogram(histogram: Histogram, name: str) -> object:
    """Charts a histogram of base-2 logarithms, with the numbers themselves on the axis."""
    values = [{"from": low, "to": high, "rows": n} for low, high, n in histogram.bars()]
    powers = list(range(math.floor(values[0]["from"]), math.ceil(values[-1]["to"]) + 1)) if values else []
    label = "format(pow(2, datum.value), '.3~g')"
    spec = {
        "data": {"values": values},
        "mark": {"type": "bar", "binSpacing": 0.5, "color": OTHER},
        "encoding": {
            "x": _quantity("from", name, bin={"binned": True}, axis={"labelExpr": label, "values": powers}),
            "x2": {"field": "to"},
            "y": _quantity("rows", "rows"),
        },
    }
    rows = [[f"{2 ** v['from']:.4g} to {2 ** v['to']:.4g}", v["rows"]] for v in values]
    return chart(spec, f"{name} of {histogram.total:,} fetched pictures.", Table(["range", "rows"], rows))


def scores(run: Run) -> list[object]:
    """Heat maps of pairs of scores that the run stored, at most six, each with its correlation."""
    names = [n for n, dtype in run.columns().items() if n.endswith("_score") and is_number(dtype)]
    pairs = [(one, two) for i, one in enumerate(names) for two in names[i + 1 :][:3]]
    return list(islice((grid for pair in pairs if (grid := _grid(run, *pair)) is not None), 6))


def _grid(run: Run, one: str, two: str) -> object:
    """The heat map of two scores, with Pearson's correlation; None if fewer than three rows have both."""

    def pairs() -> Iterator[tuple[np.ndarray, np.ndarray]]:
        for table in run.scan([one, two], after=_first_with(run, one, two)):
            x, y = numbers(table[one]), numbers(table[two])
            both = np.isfinite(x) & np.isfinite(y)
            yield x[both], y[both]

    ranges = [Histogram(), Histogram()]
    sums = np.zeros(6)
    for x, y in pairs():
        ranges[0].add(x)
        ranges[1].add(y)
        sums += [len(x), x.sum(), y.sum(), (x * x).sum(), (y * y).sum(), (x * y).sum()]
    if sums[0] < 3:
        return None
    edges = [np.linspace(bars[0][0], bars[-1][1], 33) for bars in (h.bars() for h in ranges)]
    counts = sum((np.histogram2d(x, y, edges)[0] for x, y in pairs()), np.zeros((32, 32)))
    n, sx, sy, sxx, syy, sxy = sums
    spread = (n * sxx - sx**2) * (n * syy - sy**2)
    correlation = (n * sxy - sx * sy) / spread**0.5 if spread > 0 else math.nan
    (x0, x1), (y0, y1) = ((e[:-1], e[1:]) for e in edges)
    values = [
        {"x": x0[i], "x2": x1[i], "y": y0[j], "y2": y1[j], "rows": math.log1p(counts[i, j])}
        for i, j in zip(*np.nonzero(counts))
    ]
    spec = {
        "data": {"values": values},
        "mark": {"type": "rect", "color": OTHER},
        "encoding": {
            "x": _quantity("x", one, scale={"zero": False}),
            "x2": {"field": "x2"},
            "y": _quantity("y", two, scale={"zero": False}),
            "y2": {"field": "y2"},
            "opacity": {"field": "rows", "type": "quantitative", "scale": {"range": [0.15, 1]}, "legend": None},
        },
    }
    summary = f"{one} against {two}: correlation {correlation:.2f} over {int(n):,} rows."
    return chart(spec, summary, width=360, height=300)


def scorer(found: fitness.Fitness) -> dict[str, object]:
    """How well a scorer separates matching captions from others: `verdict`, `chart` and `table`."""
    values = [
        {"from": a, "to": b, "density": d, "is": name}
        for name, densities in (("own captions", found.own), ("other captions", found.other))
        for a, b, d in zip(found.edges, found.edges[1:], densities)
    ]
    spec = {
        "data": {"values": values},
        "mark": {"type": "area", "interpolate": "step-after", "opacity": 0.55, "line": True},
        "encoding": {
            "x": _quantity("from", found.score, scale={"zero": False}),
            "y": _quantity("density", "density", stack=None),
            "color": {"field": "is", "scale": {"domain": ["own captions", "other captions"], "range": [KEPT, OTHER]}},
        },
    }
    whole = found.fits[0]
    rows = [[f.group, f.rows, f.auc, f"{f.low:.3f} to {f.high:.3f}", f"{f.overlap:.0%}", f.word] for f in found.fits]
    columns = ["rows of", "rows", "AUC", "95% interval", "overlap", "told apart"]
    return {
        "score": found.score,
        "verdict": f"{found.score} {whole}.",
        "bad": whole.low < 0.7,
        "chart": chart(spec, f"{found.score} of pictures with their own captions and with captions of other rows."),
        "table": Table(columns, rows),
    }


def timings(run: Run) -> dict[str, object]:
    """The seconds of each step, how each pass's workers spent their time, and what limited the pass."""
    lines = [(label, line) for label, line in run.funnel.lines.items() if line.seconds > 0]
    total = sum(line.seconds for _, line in lines)
    spec = {
        "data": {"values": [{"step": label, "seconds": line.seconds} for label, line in lines]},
        "mark": {"type": "bar", "color": OTHER, "cornerRadiusEnd": 2},
        "encoding": {
            "y": {"field": "step", "sort": "-x", "title": None},
            "x": _quantity("seconds", "seconds of work"),
        },
    }
    slowest = max(lines, key=lambda item: item[1].seconds, default=None)
    summary = "Seconds of work of each step, all workers together. The seconds of a step that fetches include waiting."
    if slowest is not None:
        summary += f" {slowest[0]} takes the most: {share(slowest[1].seconds, total)}."
    limits = pass_limits(run)
    return {
        "chart": chart(spec, summary, height=20 * max(1, len(lines))),
        "passes": _passes_chart(limits) if any(limit.total for limit in limits) else None,
        "table": Table(
            ["pass", "steps", "wall time", "limited by", "because"],
            [[limit.label, ", ".join(limit.steps), spell(limit.seconds) if limit.seconds else None,
              limit.by, limit.why] for limit in limits],
        ),
    }  # fmt: skip


def _passes_chart(limits: Sequence[Limit]) -> object:
    kinds = {
        "no unit": ("waiting", DROPPED),
        "reading and writing": ("storage", SERIES[3]),
        "computing": ("computing", KEPT),
        "waiting": ("idle", OTHER),
    }
    shown = [limit for limit in limits if limit.total]
    values = [
        {"pass": limit.label, "seconds": getattr(limit, name), "is": kind, "order": order}
        for limit in shown
        for order, (kind, (name, _)) in enumerate(kinds.items())
    ]
    spec = {
        "data": {"values": values},
        "mark": {"type": "bar"},
        "encoding": {
            "y": {"field": "pass", "sort": [limit.label for limit in shown], "title": None},
            "x": _quantity("seconds", "share of the workers' time", stack="normalize", axis={"format": ".0%"}),
            "order": {"field": "order"},
            "color": {"field": "is", "legend": {"columns": 2},
                      "scale": {"domain": list(kinds), "range": [colour for _, colour in kinds.values()]}},
        },
    }  # fmt: skip
    columns = ["pass", *(f"{kind}, s" for kind in kinds)]
    rows = [[limit.label, limit.waiting, limit.storage, limit.computing, limit.idle] for limit in shown]
    summary = (
        "How the workers of each pass spent their time. In a step, a worker counts as computing while it is on a core "
        "or waiting for one; otherwise it is waiting for something else."
    )
    return chart(spec, summary, Table(columns, rows), height=22 * max(2, len(shown)))


def versions() -> Table:
    """The versions of the main libraries, and the hardware."""
    rows: list[list[object]] = [["Python", platform.python_version()]]
    for name in ("winnow-clip", "ray", "pyarrow", "dask", "torch", "open_clip_torch", "img2dataset", "webdataset"):
        try:
            rows.append([name, metadata.version(name)])
        except metadata.PackageNotFoundError:
            continue
    cpu = platform.processor() or platform.machine()
    with contextlib.suppress(OSError):
        if model := re.search(r"^model name.*?:(.*)", Path("/proc/cpuinfo").read_text(errors="replace"), re.MULTILINE):
            cpu = model[1].strip()
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    rows += [["processor", f"{os.cpu_count()} × {cpu}"], ["memory", page.size(memory)], ["system", platform.platform()]]
    return Table(["of the machine that wrote this page", "version"], rows)
