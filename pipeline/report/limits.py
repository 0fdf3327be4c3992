"""Finds what limited each pass of a run, from how its workers spent their time. docs/report.md states the rule."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from pipeline.page import share
from pipeline.reader import Run
from pipeline.scheduler.events import read_events
from pipeline.scheduler.meter import Spent
from pipeline.scheduler.passes import BarrierPass, Pass, PoolPass
from pipeline.scheduler.progress import clock
from pipeline.storage import Store


class Limit(NamedTuple):
    """What limited a pass."""

    label: str
    steps: Sequence[str]
    seconds: float
    """Wall-clock time of all commands that worked on the pass; 0 if unknown."""
    waiting: float
    """Seconds that its workers had no unit. The next three fields divide the seconds that they had one."""
    storage: float
    """Outside the steps: reading the columns of a unit, writing its results."""
    computing: float
    """In the steps, on a core or waiting for one."""
    idle: float
    """In the steps, but doing neither: waiting for hosts, for example."""
    by: str
    """The verdict, such as `too few cores`."""
    why: str
    """The figures behind it."""

    @property
    def total(self) -> float:
        return self.waiting + self.storage + self.computing + self.idle


def spell(seconds: float) -> str:
    """Formats seconds as `0.4 s`, or as `h:mm:ss` from one minute on."""
    return f"{seconds:.1f} s" if seconds < 60 else clock(seconds)


def pass_limits(run: Run) -> list[Limit]:
    """Applies the rule of docs/report.md to each pass."""
    spent = _spent(run)
    return [_limit(run, p, spent.get(p.label, Spent())) for p in run.passes]


def _limit(run: Run, p: Pass, spent: Spent) -> Limit:
    labels = p.labels
    steps = sum(run.funnel.lines[label].seconds for label in labels)
    working, elapsed = spent["working"], spent["seconds"] or (0.0 if p.over_units else steps)
    own, children = spent["cpu"] + spent["queued"], spent["child_cpu"] + spent["child_queued"]
    if isinstance(p, (PoolPass, BarrierPass)):  # their steps' seconds are those of the whole pass
        steps = min(working, own)
    steps = min(working, steps)
    computing = min(steps, max(own, children))
    storage, idle = working - steps, steps - computing
    shares = (spent["waiting"], storage, computing, idle)

    def limited(by: str, why: str) -> Limit:
        return Limit(p.label, labels, elapsed, *shares, by, why)

    if not working:
        return limited("not recorded", "")
    slowest = max(labels, key=lambda label: run.funnel.lines[label].seconds)
    if spent["waiting"] > working:
        waited = share(spent["waiting"], spent["waiting"] + working)
        return limited("the pass before it", f"its workers had no unit {waited} of the time")
    queued, who = (spent["child_queued"], "decoding") if children > own else (spent["queued"], slowest)
    if 2 * queued > working:
        ran = spent["child_cpu"] if children > own else spent["cpu"]
        return limited("too few cores", f"{who}: {spell(ran)} on a core, {spell(queued)} in line for one")
    if max(shares[1:]) == storage:
        return limited("reading and writing", f"{share(storage, working)} of the workers' time with a unit")
    if max(shares[1:]) == idle:
        fetches = any(not step.repeatable for step in p.steps)
        return limited(
            "hosts and the network" if fetches else f"what {slowest} waits for",
            f"{share(idle, working)} of the workers' time neither on a core nor in line for one",
        )
    return limited(
        f"computing: {who}", f"{share(computing, working)} of the workers' time on a core or in line for one"
    )


def _spent(run: Run) -> dict[str, Spent]:
    """Reads from the run's log how the workers of each pass spent their time, and its wall-clock `seconds`.

    An interrupted pass counts all commands that worked on it.
    """
    spent: dict[str, Spent] = {}
    before: dict[str, Spent] = {}
    finished: set[str] = set()
    for event in read_events(Store(run.path)):
        for bar in event.get("passes", []) if event["event"] not in ("command", "reused") else ():
            label = bar["pass"]
            if event["event"] == "started":
                before[label] = Spent() if label in finished else Spent(spent.get(label, {}))
                finished.discard(label)
            elif event["event"] == "finished":
                finished.add(label)
            spent[label] = Spent(before.get(label, {}))
            spent[label] += {**bar.get("spent", {}), "seconds": bar["seconds"]}
    return spent
