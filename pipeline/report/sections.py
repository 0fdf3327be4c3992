"""The sections of the report, each a function from a run to the charts and tables of its page."""

from __future__ import annotations

import math
import os
import platform
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline import page
from pipeline.fetch import reasons
from pipeline.page import CUT, DROPPED, KEPT, OTHER, SERIES, Picture, Table, Thumbnails, chart, count, share
from pipeline.reader import Run, RunStep
from pipeline.report import fitness
from pipeline.report.histogram import Histogram, Named, Nearest
from pipeline.report.limits import Limit, pass_limits, spell
from pipeline.scheduler.progress import clock
from pipeline.schema import is_number, numbers
from pipeline.text.hashing import hash64
from pipeline.text.url import hosts as hosts_of

DOZEN = 12
"""Pictures from each side of a cut, and of what a step dropped."""
MOST_HOSTS = 50_000
"""Hosts counted at a time. Beyond twice as many, the rarest are forgotten."""
_DIGEST = re.compile(r"\b([0-9a-f]{8})[0-9a-f]{24,}\b")


@dataclass
class Judged:
    """What a step dropped, and where it drew the line."""

    step: RunStep
    line: Any
    column: str | None = None
    """The numeric column that it compares, if its values are stored."""
    kept: Histogram = field(default_factory=Histogram)
    dropped: Histogram = field(default_factory=Histogram)
    cuts: list[float] = field(default_factory=list)
    above: Nearest = field(default_factory=lambda: Nearest(DOZEN))
    below: Nearest = field(default_factory=lambda: Nearest(DOZEN))
    random: Nearest = field(default_factory=lambda: Nearest(DOZEN))


def judge(run: Run, step: RunStep, line: Any, some: set[int], lost: Counter[str]) -> Judged:
    """Goes through what a step dropped, and through what it kept if it compares a stored number."""
    of, named, column = Judged(step, line), step.label.partition(".")[0], step.options.get("column")
    compares = isinstance(column, str) and column in run.columns(step.label)
    bounds = [step.options.get(key) for key in ("min", "max") if compares]
    of.cuts = [float(bound) for bound in bounds if isinstance(bound, int | float)]

    def away(values: np.ndarray, side: int) -> np.ndarray:
        """How far values are from the cut, which lies below (1) or above (-1) all of them if it is not given."""
        near = np.abs(np.subtract.outer(values, of.cuts)).min(axis=1) if of.cuts else side * values
        return np.where(np.isfinite(values), near, np.inf)

    for table in run.drops(step.label):
        if not len(table):
            continue
        values = numbers(table["value"])
        of.dropped.add(values)
        count_hosts(lost, table["url"])
        if (unit := table["unit"][0].as_py()) in some or unit is None:
            notes = [
                _short(" ".join(text for text in (reason if reason != named or not detail else "", detail) if text))
                for reason, detail in zip(table["reason"].to_pylist(), table["detail"].to_pylist())
            ]
            of.random.add(hash64(table["uid"], purpose="report").astype(np.float64), table, notes)
            of.below.add(away(values, -1), table, notes)
    if not compares or not of.dropped.total:
        return of
    of.column, lowest = str(column), math.inf
    for table in run.scan(of.column, after=step.label):
        values = numbers(table[of.column])
        of.kept.add(values)
        lowest = min(lowest, float(np.nanmin(values, initial=math.inf)))
        if len(table) and table["unit"][0].as_py() in some:
            of.above.add(away(values, 1), table, [f"{v:.4g}" for v in values])
    of.cuts = of.cuts or [lowest]
    return of


def _first(run: Run, *columns: str) -> str | None:
    """The first step after which these columns can be read; None if there is none."""
    return next((step.label for step in run.steps if set(columns) <= run.columns(step.label).keys()), None)


def count_hosts(counter: Counter[str], urls: pa.ChunkedArray) -> None:
    counter.update(pc.fill_null(hosts_of(urls), "").to_pylist())
    if len(counter) > 2 * MOST_HOSTS:
        for host, _ in counter.most_common()[MOST_HOSTS:]:
            del counter[host]


def facts(run: Run) -> list[tuple[str, str]]:
    lines = run.funnel.lines.values()
    seconds = sum(line.seconds for line in lines)
    return [
        (count(run.rows_in), "rows in the pool"),
        (count(run.kept), "kept"),
        (share(run.kept, run.rows_in), "of the pool"),
        (count(run.rows_in - run.kept), "dropped, each with its reason"),
        (count(len(run.steps) - 1), "steps"),
        (clock(seconds), "of work, all workers together"),
    ]


def funnel(run: Run) -> dict[str, object]:
    lines = list(run.funnel.lines.items())
    held = _bytes_after(run)
    values: list[dict[str, object]] = []
    rows: list[list[object]] = []
    for label, line in lines:
        gone = sum(line.dropped.values())
        values += [
            {"step": label, "rows": line.kept, "is": "kept"},
            {"step": label, "rows": gone, "is": "dropped here"},
        ]
        rate = line.rows_in / line.seconds if line.seconds > 0 else None
        rows.append(
            [label, line.rows_in, line.kept, share(line.kept, line.rows_in), share(line.kept, run.rows_in),
             page.size(held[label]) if label in held else None, None if rate is None else round(rate),
             f"{line.seconds:,.1f}"]
        )  # fmt: skip
    spec = {
        "data": {"values": values},
        "mark": {"type": "bar", "cornerRadiusEnd": 2},
        "encoding": {
            "y": {"field": "step", "sort": [label for label, _ in lines], "title": None},
            "x": {"field": "rows", "type": "quantitative", "title": "rows"},
            "order": {"field": "is", "sort": "descending"},
            "color": {"field": "is", "scale": {"domain": ["kept", "dropped here"], "range": [KEPT, DROPPED]}},
        },
    }
    said = f"Of {run.rows_in:,} rows, {run.kept:,} ({share(run.kept, run.rows_in)}) come out."
    if lines:
        worst, line = max(lines, key=lambda item: sum(item[1].dropped.values()))
        said += f" {worst} drops most: {sum(line.dropped.values()):,}."
    columns = ["step", "rows in", "kept", "of these", "of the pool", "pictures", "rows/s", "seconds"]
    return {"chart": chart(spec, said, height=26 * len(lines)), "table": Table(columns, rows)}


def _bytes_after(run: Run) -> dict[str, int]:
    """The bytes of the fetched pictures that are left after each step."""
    column = "original_bytes"
    labels = [step.label for step in run.steps]
    if (first := _first(run, column)) is None:
        return {}
    total, held = 0, {}
    for label in labels[labels.index(first) :]:
        if label == first or run.funnel.lines[label].dropped:
            total = sum(int(pc.sum(t[column]).as_py() or 0) for t in run.scan(column, after=label))
        held[label] = total
    return held


def shown_step(run: Run, of: Judged, thumbnails: Thumbnails, pictured: bool) -> dict[str, object]:
    line, label = of.line, of.step.label
    sides: list[tuple[str, list[Picture] | Table]] = []
    gone = sum(line.dropped.values())
    reasons_ = sorted(line.dropped.items(), key=lambda item: (-item[1], item[0]))
    out: dict[str, object] = {
        "label": label,
        "said": f"{gone:,} of {line.rows_in:,} rows dropped ({share(gone, line.rows_in)}).",
        "reasons": Table(["reason", "rows", "share"], [[r, n, share(n, line.rows_in)] for r, n in reasons_]),
        "chart": _distribution(of),
        "sides": sides,
    }
    chosen = [("just kept", of.above), ("just dropped", of.below)] if of.column else []
    chosen.append(("a random dozen of what it dropped", of.random))
    for title, rows in chosen:
        items = _pictures(run, rows.rows(), thumbnails if pictured else None)
        if any(item.address for item in items):
            sides.append((title, items))
        elif items:
            lines = dict.fromkeys((item.caption, *item.notes) for item in items)  # one caption under many pictures
            sides.append((title, Table(["caption", "why"], list(lines))))
    return out


def _distribution(of: Judged) -> object:
    """The histogram of what a step compared, or of the numbers that decided its drops; None if there are none."""
    width = max(of.kept.width, of.dropped.width)
    values = [
        {"from": low, "to": high, "rows": n, "is": name}
        for name, histogram in (("dropped", of.dropped), ("kept", of.kept))
        for low, high, n in histogram.bars(width)
    ]
    if len({v["from"] for v in values if v["rows"]}) < 4:
        return None
    name = of.column or "the number that decided"
    colours = {"kept": KEPT, "dropped": DROPPED} if of.kept.total else {"dropped": DROPPED}
    layers: list[dict[str, object]] = [
        {
            "data": {"values": values},
            "mark": {"type": "bar", "binSpacing": 0.5, "opacity": 0.85},
            "encoding": {
                "x": {"field": "from", "type": "quantitative", "bin": {"binned": True}, "title": name,
                      "scale": {"zero": False}},
                "x2": {"field": "to"},
                "y": {"field": "rows", "type": "quantitative", "title": "rows"},
                "color": {"field": "is", "scale": {"domain": [*colours], "range": [*colours.values()]}},
            },
        }
    ]  # fmt: skip
    cuts = [cut for cut in of.cuts if math.isfinite(cut)]
    for cut in cuts:
        layers += _rule("x", cut, f"cut {cut:.4g}")
    said = (
        f"{name}: {of.kept.total:,} kept, {of.dropped.total:,} dropped" if of.column else f"{name} of each dropped row"
    )
    if cuts:
        said += f", cut at {' and '.join(f'{cut:.4g}' for cut in cuts)}"
    rows = [[f"{v['from']:.4g} to {v['to']:.4g}", v["is"], v["rows"]] for v in values]
    return chart({"layer": layers}, f"{said}.", Table(["range", "rows that were", "rows"], rows))


def _rule(axis: str, at: float, text: str) -> list[dict[str, object]]:
    """The layers of a line across a chart at a value of an axis, and of its label."""
    data = {"data": {"values": [{"at": at}]}}
    place: dict[str, object] = {axis: {"field": "at", "type": "quantitative"}}
    label = {"type": "text", "align": "left", "dx": 5, "dy": -2, "text": text, "color": CUT}
    label["baseline"] = "top" if axis == "x" else "bottom"
    return [
        {**data, "mark": {"type": "rule", "strokeWidth": 2}, "encoding": place},
        {**data, "mark": label, "encoding": {**place, "y" if axis == "x" else "x": {"value": 0}}},
    ]


def _short(text: str) -> str:
    """Text with long digests cut: their first digits tell them apart."""
    return _DIGEST.sub(r"\1…", text)


def _pictures(run: Run, rows: list[Named], thumbnails: Thumbnails | None) -> list[Picture]:
    """Captions and, where they were fetched, pictures of rows."""
    found: dict[tuple[int, int], dict[str, Any]] = {}
    for unit in sorted({row.unit for row in rows if row.unit >= 0}):
        numbers = [row.row for row in rows if row.unit == unit]
        columns = ["caption", *(["image"] if thumbnails else [])]
        for values in run.take(unit, numbers, columns).to_pylist():
            found[unit, values["row"]] = values
    shown = []
    for row in rows:
        values = found.get((row.unit, row.row))
        if values is not None:
            address = thumbnails(values.get("image")) if thumbnails else None
            shown.append(Picture(address, values["caption"], [row.note] if row.note else []))
    return shown


def failures(run: Run) -> Table | None:
    """Why downloads failed, and whether another try may help."""
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


def hosts(hosts: dict[str, Counter[str]]) -> Table:
    rows = [
        [host or "(none)", hosts["rows"][host], n, share(n, hosts["rows"][host])]
        for host, n in hosts["lost"].most_common(20)
        if hosts["rows"][host]
    ]
    return Table(["host", "rows", "dropped", "share"], rows)


def languages(run: Run) -> object:
    step = next((step for step in run.steps if "language" in step.adds), None)
    if step is None:
        return None
    counts: Counter[str] = Counter()
    for table in run.scan("language", after=_first(run, "language")):
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
            "x": {"field": "rows", "type": "quantitative", "scale": {"type": "symlog"}, "title": "rows (log)",
                  "axis": {"values": ticks}},
            "color": {"field": "is", "scale": {"domain": ["kept", "dropped"], "range": [KEPT, DROPPED]}},
        },
    }  # fmt: skip
    said = f"{step.label} kept {sum(counts.values()):,} captions and dropped {sum(dropped.values()):,}; by the most "
    said += "likely language of each."
    asked = step.options.get("keep")
    if asked and (others := sum(n for name, n in counts.items() if name not in asked)):
        said += f" Of those kept, {others:,} are most likely in a language that was not asked for, but those that were "
        said += "are together likely enough (min_score)."
    table = Table(["language", "rows that were", "rows"], [[v["language"], v["is"], v["rows"]] for v in values])
    return chart(spec, said, table, height=24 * max(3, len({v["language"] for v in values})))


def duplicates(run: Run, some: set[int], thumbnails: Thumbnails) -> Iterator[tuple[str, list[Picture]]]:
    """Some groups of duplicates: the row that was kept, and those that were dropped for it."""
    for step in run.steps:
        if step.step.rpartition(".")[2] not in ("NearDedup", "SemanticDedup") or step.label not in run.funnel.lines:
            continue
        groups: dict[str, list[Named]] = defaultdict(list)
        for table in run.drops(step.label, units=sorted(some)):
            for drop in table.select(["unit", "row", "detail"]).to_pylist():
                keeper = (drop["detail"] or "").split(" ")[0]
                if len(groups) < 4 * DOZEN or keeper in groups:
                    note = (drop["detail"] or "").removeprefix(keeper).lstrip(" ,;")
                    groups[keeper].append(Named(drop["unit"], drop["row"], note))
        largest = sorted(groups.items(), key=lambda item: (-len(item[1]), item[0]))[: DOZEN // 2]
        kept = run.pictures([keeper for keeper, _ in largest])
        for keeper, rows in largest:
            first = Picture(thumbnails(kept.get(keeper)), "kept", [_short(keeper)])
            copies = f"{len(rows):,} {'copy' if len(rows) == 1 else 'copies'}"
            yield f"{step.label}: {copies}", [first, *_pictures(run, rows[:5], thumbnails)]


def concepts(run: Run) -> Iterator[object]:
    """For each `balance`, the captions that its entries have before and after it, the most frequent entries first."""
    for step in run.steps:
        figures = run.funnel.lines[step.label].figures if step.label in run.funnel.lines else []
        if not step.step.endswith(".Balance") or not figures:
            continue
        bins: dict[int, Counter[str]] = defaultdict(Counter)
        for figure in figures:
            bins[figure["at_least"]].update({key: figure[key] for key in ("entries", "matches", "kept")})
        values: list[dict[str, object]] = []
        rank = 1
        for _, of in sorted(bins.items(), reverse=True):
            for is_, matches in (("before", of["matches"]), ("after", of["kept"])):
                if matches:  # the scale has no zero
                    each = matches / of["entries"]
                    values += [{"rank": at, "captions": each, "is": is_} for at in (rank, rank + of["entries"])]
            rank += of["entries"]
        caps = sorted({figure["cap"] for figure in figures})
        curve = {
            "transform": [{"filter": "datum.is == 'before'"}],
            "mark": {"type": "line", "strokeWidth": 7, "opacity": 0.4},  # where both are equal, both show
            "encoding": {
                "x": {"field": "rank", "type": "quantitative", "title": "entries, the most frequent first",
                      "scale": {"type": "log", "nice": False}},
                "y": {"field": "captions", "type": "quantitative", "title": "captions of an entry",
                      "scale": {"type": "log"}},
                "color": {"field": "is", "scale": {"domain": ["before", "after"], "range": [OTHER, KEPT]}},
            },
        }  # fmt: skip
        after = {**curve, "transform": [{"filter": "datum.is == 'after'"}], "mark": "line"}
        curves = {"data": {"values": values}, "layer": [curve, after]}
        spec = {"layer": [curves, *(_rule("y", caps[0], f"cap {caps[0]:,}") if len(caps) == 1 else [])]}
        tail = [figure for figure in figures if 2 * figure["at_least"] <= figure["cap"]]
        whole, rare = ({key: sum(f[key] for f in of) for key in ("matches", "kept")} for of in (figures, tail))
        said = (
            f"{step.label}: captions with each of {rank - 1:,} entries, before and after. The tail, entries well below "
            f"the cap, holds {share(rare['matches'], whole['matches'])} of all matches before and "
            f"{share(rare['kept'], whole['kept'])} after."
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
        yield chart(spec, said, Table(columns, rows), width=560, height=240)


def sizes(run: Run) -> list[object]:
    sides = ("original_width", "original_height")
    if (label := _first(run, *sides)) is None:
        return []
    width, ratio = Histogram(), Histogram()
    for table in run.scan(sides, after=label):
        w, h = (numbers(table[side]) for side in sides)
        width.add(np.log2(np.maximum(np.minimum(w, h), 1)))
        ratio.add(np.log2(np.maximum(w, 1) / np.maximum(h, 1)))
    return [
        _log_histogram(width, "shorter side, pixels"),
        _log_histogram(ratio, "width / height"),
    ]


def _log_histogram(histogram: Histogram, name: str) -> object:
    """The chart of a histogram of logarithms to base 2, with the numbers themselves on the axis."""
    values = [{"from": low, "to": high, "rows": n} for low, high, n in histogram.bars()]
    powers = list(range(math.floor(values[0]["from"]), math.ceil(values[-1]["to"]) + 1)) if values else []
    spec = {
        "data": {"values": values},
        "mark": {"type": "bar", "binSpacing": 0.5, "color": OTHER},
        "encoding": {
            "x": {"field": "from", "type": "quantitative", "bin": {"binned": True}, "title": name,
                  "axis": {"labelExpr": "format(pow(2, datum.value), '.3~g')", "values": powers}},
            "x2": {"field": "to"},
            "y": {"field": "rows", "type": "quantitative", "title": "rows"},
        },
    }  # fmt: skip
    rows = [[f"{2 ** v['from']:.4g} to {2 ** v['to']:.4g}", v["rows"]] for v in values]
    return chart(spec, f"{name} of {histogram.total:,} fetched pictures.", Table(["range", "rows"], rows))


def scores(run: Run) -> list[object]:
    """Each pair of scores that the run stored, as a heat map with its correlation."""
    names = [n for n, dtype in run.columns().items() if n.endswith("_score") and is_number(dtype)]
    found = []
    for i, one in enumerate(names):
        for two in names[i + 1 :][:3]:
            grid = _grid(run, one, two)
            if grid is not None:
                found.append(grid)
    return found[:6]


def _grid(run: Run, one: str, two: str) -> object:
    label = _first(run, one, two)
    ranges = [Histogram(), Histogram()]
    sums = np.zeros(6)
    for table in run.scan([one, two], after=label):
        x, y = numbers(table[one]), numbers(table[two])
        there = np.isfinite(x) & np.isfinite(y)
        x, y = x[there], y[there]
        for histogram, values in zip(ranges, (x, y)):
            histogram.add(values)
        sums += [len(x), x.sum(), y.sum(), (x * x).sum(), (y * y).sum(), (x * y).sum()]
    if sums[0] < 3:
        return None
    edges = [np.linspace(bars[0][0], bars[-1][1], 33) for bars in (h.bars() for h in ranges)]
    counts = np.zeros((32, 32))
    for table in run.scan([one, two], after=label):
        x, y = numbers(table[one]), numbers(table[two])
        there = np.isfinite(x) & np.isfinite(y)
        counts += np.histogram2d(x[there], y[there], edges)[0]
    n, sx, sy, sxx, syy, sxy = sums
    spread = (n * sxx - sx**2) * (n * syy - sy**2)
    correlation = (n * sxy - sx * sy) / spread**0.5 if spread > 0 else math.nan
    values = [
        {
            "x": edges[0][i],
            "x2": edges[0][i + 1],
            "y": edges[1][j],
            "y2": edges[1][j + 1],
            "rows": math.log1p(counts[i, j]),
        }
        for i, j in zip(*np.nonzero(counts))
    ]
    spec = {
        "data": {"values": values},
        "mark": {"type": "rect", "color": OTHER},
        "encoding": {
            "x": {"field": "x", "type": "quantitative", "title": one, "scale": {"zero": False}},
            "x2": {"field": "x2"},
            "y": {"field": "y", "type": "quantitative", "title": two, "scale": {"zero": False}},
            "y2": {"field": "y2"},
            "opacity": {"field": "rows", "type": "quantitative", "scale": {"range": [0.15, 1]}, "legend": None},
        },
    }
    return chart(
        spec, f"{one} against {two}: correlation {correlation:.2f} over {int(n):,} rows.", width=360, height=300
    )


def scorer(found: fitness.Fitness) -> dict[str, object]:
    values = [
        {"from": a, "to": b, "density": d, "is": name}
        for name, of in (("own captions", found.own), ("other captions", found.other))
        for a, b, d in zip(found.edges, found.edges[1:], of)
    ]
    spec = {
        "data": {"values": values},
        "mark": {"type": "area", "interpolate": "step-after", "opacity": 0.55, "line": True},
        "encoding": {
            "x": {"field": "from", "type": "quantitative", "title": found.score, "scale": {"zero": False}},
            "y": {"field": "density", "type": "quantitative", "title": "density", "stack": None},
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
        "chart": chart(spec, f"{found.score} of pictures with their own captions and with those of other rows."),
        "table": Table(columns, rows),
    }


def timings(run: Run) -> dict[str, object]:
    """Seconds of each step, and what the time of each pass's workers went to."""
    lines = [(label, line) for label, line in run.funnel.lines.items() if line.seconds > 0]
    total = sum(line.seconds for _, line in lines)
    spec = {
        "data": {"values": [{"step": label, "seconds": line.seconds} for label, line in lines]},
        "mark": {"type": "bar", "color": OTHER, "cornerRadiusEnd": 2},
        "encoding": {
            "y": {"field": "step", "sort": "-x", "title": None},
            "x": {"field": "seconds", "type": "quantitative", "title": "seconds of work"},
        },
    }
    slowest = max(lines, key=lambda item: item[1].seconds, default=None)
    said = "Seconds of work of each step, all workers together; for a step that fetches, waiting included."
    if slowest is not None:
        said += f" {slowest[0]} takes most: {share(slowest[1].seconds, total)}."
    limits = pass_limits(run)
    return {
        "chart": chart(spec, said, height=20 * max(1, len(lines))),
        "passes": _passes_chart(limits) if any(limit.total for limit in limits) else None,
        "table": Table(
            ["pass", "steps", "by the clock", "limited by", "because"],
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
            "x": {"field": "seconds", "type": "quantitative", "stack": "normalize",
                  "title": "share of the workers' time", "axis": {"format": ".0%"}},
            "order": {"field": "order"},
            "color": {"field": "is", "legend": {"columns": 2},
                      "scale": {"domain": list(kinds), "range": [colour for _, colour in kinds.values()]}},
        },
    }  # fmt: skip
    columns = ["pass", *(f"{kind}, s" for kind in kinds)]
    rows = [[limit.label, limit.waiting, limit.storage, limit.computing, limit.idle] for limit in shown]
    said = (
        "How the workers of each pass spent their time. Within the steps, a worker computes while it is on a core or "
        "waits for one; otherwise it waits for something else."
    )
    return chart(spec, said, Table(columns, rows), height=22 * max(2, len(shown)))


def versions() -> Table:
    rows: list[list[object]] = [["Python", platform.python_version()]]
    for name in ("winnow-clip", "ray", "pyarrow", "dask", "torch", "open_clip_torch", "img2dataset", "webdataset"):
        try:
            rows.append([name, metadata.version(name)])
        except metadata.PackageNotFoundError:
            continue
    cpu = next(
        (line.partition(":")[2].strip() for line in _lines("/proc/cpuinfo") if line.startswith("model name")),
        platform.processor() or platform.machine(),
    )
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    rows += [["processor", f"{os.cpu_count()} × {cpu}"], ["memory", page.size(memory)], ["system", platform.platform()]]
    return Table(["of the machine that wrote this page", "version"], rows)


def _lines(path: str) -> Iterable[str]:
    try:
        return Path(path).read_text(errors="replace").splitlines()
    except OSError:
        return []
