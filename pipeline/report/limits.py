"""What limited each pass of a run, from what its workers' time went to. docs/report.md states the rule."""

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
    """By the clock, over all commands that worked on the pass; 0 if that is not known."""
    waiting: float
    """Seconds of its workers without a unit. The next three are of their time with one."""
    storage: float
    """Outside of the steps: reading columns of a unit, writing its results."""
    computing: float
    """In the steps, on a core or in line for one."""
    idle: float
    """In the steps, neither: waiting for hosts, for example."""
    by: str
    why: str

    @property
    def total(self) -> float:
        return self.waiting + self.storage + self.computing + self.idle


def spell(seconds: float) -> str:
    """A time for people: `0.4 s`, from a minute on `h:mm:ss`."""
    return f"{seconds:.1f} s" if seconds < 60 else clock(seconds)


def pass_limits(run: Run) -> list[Limit]:
    """What limited each pass, as docs/report.md states the rule."""
    spent = _spent(run)
    return [_limit(run, p, spent.get(p.label, Spent())) for p in run.passes]


def _limit(run: Run, p: Pass, spent: Spent) -> Limit:
    labels = p.labels
    steps = sum(run.funnel.lines[label].seconds for label in labels)
    working, elapsed = spent["working"], spent["seconds"] or (0.0 if p.over_units else steps)
    own, children = spent["cpu"] + spent["queued"], spent["child_cpu"] + spent["child_queued"]
    if isinstance(p, (PoolPass, BarrierPass)):  # the seconds of their steps are those of the whole pass
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
        part = share(spent["waiting"], spent["waiting"] + working)
        return limited("the pass before it", f"its workers had no unit {part} of the time")
    queued, who = (spent["child_queued"], "decoding") if children > own else (spent["queued"], slowest)
    if 2 * queued > working:
        ran = spent["child_cpu"] if children > own else spent["cpu"]
        return limited("too few cores", f"{who}: {spell(ran)} on a core, {spell(queued)} in line for one")
    if max(shares[1:]) == storage:
        return limited("reading and writing", f"{share(storage, working)} of the workers' time with a unit")
    if max(shares[1:]) == idle:
        what = f"{share(idle, working)} of the workers' time neither on a core nor in line for one"
        fetches = any(not step.repeatable for step in p.steps)
        return limited("hosts and the network" if fetches else f"what {slowest} waits for", what)
    part = share(computing, working)
    return limited(f"computing: {who}", f"{part} of the workers' time on a core or in line for one")


def _spent(run: Run) -> dict[str, Spent]:
    """By pass, what the time of its workers went to and the seconds by the clock, from the log of the run.

    A pass that was interrupted counts with all commands that worked on it.
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
