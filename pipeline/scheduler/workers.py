"""Runs workers on Ray, and sends units to them.

Only unit numbers and small reports travel between the driver and its workers. The contents of a unit go through the
run's storage. The driver or a worker may die at any moment: only the commit records of units count.
"""

from __future__ import annotations

import contextlib
import copy
import gc
import math
import queue
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain, islice
from typing import Any, TypeVar

import ray
from ray.exceptions import ActorUnavailableError, OutOfMemoryError, RayActorError

from pipeline.scheduler import cluster, isolation
from pipeline.scheduler.lifetime import GOES_ON
from pipeline.scheduler.meter import Meter, Spent
from pipeline.scheduler.passes import Pass, UnitPass
from pipeline.scheduler.run_pass import UnitReport, run_pass
from pipeline.step import HaltError

T = TypeVar("T")

UNITS_AHEAD = 4
"""Maximum number of units assigned to a worker: one that is ending, one in progress, and the next ones, so that the
worker never waits."""
REPORT_EVERY = 0.5
"""Seconds between two reports of a worker in the middle of a unit."""
GROW_EVERY = 10.0
"""Seconds between two checks for room for more workers: nodes may join during a run."""
MAX_FAILED_STARTS = 3
"""Consecutive workers that may die during setup before the run fails. Workers lost with their node do not count."""


def map_tasks(
    items: Sequence[T],
    work: Callable[[Sequence[T]], Iterable[dict[str, Any]]],
    at_once: int = 1,
    spent: Spent | None = None,
) -> Iterator[dict[str, Any]]:
    """Runs `work` on the cluster over all items, `at_once` items per task. Yields its records in any order.

    For functions that need no setup and may run twice: Ray runs a task again when its worker dies. Adds the time of the
    tasks by use to `spent`.
    """

    @ray.remote(num_cpus=1)
    def task(batch: Sequence[T]) -> tuple[list[dict[str, Any]], Spent]:
        meter = Meter()
        records = list(work(batch))
        meter.add("working")
        return records, meter.take()

    starts = iter(range(0, len(items), at_once))
    running: list[Any] = []
    while True:
        room = max(0, 2 * cluster.capacity("CPU") + 2 - len(running))
        running += [task.remote(items[i : i + at_once]) for i in islice(starts, room)]
        if not running:
            return
        (done,), running = ray.wait(running, num_returns=1)
        try:
            records, took = ray.get(done)
        except OutOfMemoryError:
            raise HaltError(
                "Ray killed a task repeatedly because the machine is short of memory. End other processes, or use a "
                f"machine with more memory. {GOES_ON}"
            ) from None
        if spent is not None:
            spent += took
        yield from records


def run_passes(
    passes: list[Pass], numbers: Sequence[int], units: int, workers: int | None
) -> Iterator[tuple[int, UnitReport, int]]:
    """Sends units 0 … `units` − 1 through adjacent passes, each with its own pool of workers.

    The passes overlap: while one downloads a unit, the next scores units that are downloaded already. Yields the number
    of a pass, a report of its progress, and its number of workers.
    """
    gpus = cluster.capacity("GPU")
    resources = {
        i: "GPU" if gpus and any(step.resource == "gpu" for step in passes[i].steps) else "CPU" for i in numbers
    }
    # All pools must fit on the cluster at the same time, or one would wait for another to end.
    shares = {"CPU": 1 / max(1, list(resources.values()).count("CPU")), "GPU": 1}
    pools = []
    for i, resource in resources.items():
        # A joined cluster may grow; one that this command started does not.
        most = min(units, workers or (units if cluster.joined() else cluster.capacity(resource)))
        pools.append(_WorkerPool(passes, i, most, resource, shares[resource]))
    pools[0].backlog.extend(range(units))
    left = [units] * len(pools)
    checked = -math.inf
    try:
        while any(left):
            if time.monotonic() - checked > GROW_EVERY:
                checked = time.monotonic()
                for pool, open_units in zip(pools, left):
                    pool.grow(open_units)
            for pool in pools:
                pool.submit_units()
            streams = [stream for pool in pools for stream in pool.workers]
            ray.wait(streams, num_returns=1, timeout=GROW_EVERY)
            ready = set(ray.wait(streams, num_returns=len(streams), timeout=0)[0])
            for place, pool in enumerate(pools):
                for stream in ready & pool.workers.keys():
                    report = pool.receive(stream)
                    done = [record["unit"] for record in report.records]
                    left[place] -= len(done)
                    if place + 1 < len(pools):
                        pools[place + 1].backlog.extend(done)
                    yield pool.index, report, len(pool.workers)
                if not left[place]:
                    pool.release()
    finally:
        for pool in pools:
            pool.kill()


class _Remote:
    """A proxy for an object in an actor. Methods of the object are coroutines of the proxy."""

    def __init__(self, actor: Any) -> None:
        self._actor = actor

    def __getattr__(self, name: str) -> Callable[..., Any]:
        method = getattr(self._actor, name)

        async def call(*args: Any) -> Any:
            return await method.remote(*args)

        return call


class _Worker:
    """Runs one pass over the units assigned to it. Units that arrive in time are processed as one stream."""

    def __init__(self, passes: list[Pass], index: int, shared: dict[int, Any]) -> None:
        self._passes, self._index, self._shared = passes, index, shared
        # Once set up, steps hold models, threads and shared objects, which cannot be sent to another process.
        self._own = copy.deepcopy(passes)
        self._inbox: queue.SimpleQueue[int | None] = queue.SimpleQueue()

    def submit(self, unit: int | None) -> None:
        """Assigns a unit; None says that there are no more. Called in another thread while `run` runs."""
        self._inbox.put(unit)

    def run(self) -> Iterator[UnitReport]:
        """Sets up the steps, yields an empty report when that is done, and works until there are no more units."""
        p = self._own[self._index]
        for number, actor in self._shared.items():
            p.steps[number].connect(_Remote(actor))
        p.setup()
        # Neither the objects loaded so far nor the thousands of rows in progress are garbage. Scanning both took a
        # sixth of a fetching worker's time.
        gc.collect()
        gc.freeze()
        gc.set_threshold(10_000)
        meter = Meter()
        yield UnitReport()
        while (unit := self._inbox.get()) is not None:
            meter.add("waiting")
            for report in _merged(self._stream(unit)):
                meter.add("working")
                report.spent = meter.take()
                yield report

    def _stream(self, first: int) -> Iterator[UnitReport]:
        p, before = self._passes[self._index], self._passes[: self._index]
        assert isinstance(p, UnitPass)
        started: set[int] = set()
        found: list[dict[str, Any]] = []
        given_up: list[int] = []

        def fresh() -> Iterator[int]:
            for unit in chain([first], self._arrived()):
                if (record := p.account(before, unit)) is not None:
                    found.append(record)
                elif isolation.attempt(p, unit) > isolation.ATTEMPTS:
                    given_up.append(unit)
                else:
                    started.add(unit)
                    yield unit

        try:
            for report in run_pass(self._own, self._index, fresh()):
                started.difference_update(record["unit"] for record in report.records)
                yield report
        except HaltError:
            isolation.forgive(p, started)
            raise
        for record in found:
            yield UnitReport.of(record)
        for unit in given_up:
            yield UnitReport.of(isolation.run_isolated(self._passes, self._index, unit))

    def _arrived(self) -> Iterator[int]:
        """Yields the units in the inbox, without waiting for more."""
        with contextlib.suppress(queue.Empty):
            while True:
                unit = self._inbox.get_nowait()
                if unit is None:
                    self._inbox.put(None)  # `run` ends on it
                    return
                yield unit


def _merged(reports: Iterable[UnitReport]) -> Iterator[UnitReport]:
    """Merges reports: finished units are reported immediately, progress within a unit every REPORT_EVERY seconds."""
    held, sent = UnitReport(), time.monotonic()
    for report in reports:
        held += report
        if held.records or time.monotonic() - sent > REPORT_EVERY:
            yield held
            held, sent = UnitReport(), time.monotonic()
    yield held


@dataclass
class _WorkerHandle:
    """The driver's side of one worker."""

    actor: Any
    lost_nodes: int
    """Number of nodes that the cluster had lost when the worker started."""
    units: list[int] = field(default_factory=list)
    """Units assigned and not yet committed, the oldest first."""
    ready: bool = False


class _WorkerPool:
    """The workers of one pass, as the driver sees them."""

    def __init__(self, passes: list[Pass], index: int, most: int, resource: str, share: float) -> None:
        """At most `most` workers, each with a `share` (0 to 1) of the `resource`, "CPU" or "GPU"."""
        self.index = index
        self.backlog: deque[int] = deque()
        self.workers: dict[Any, _WorkerHandle] = {}
        """By the stream of each worker's reports."""
        self._label = passes[index].label
        self._most, self._resource = most, resource
        self._arguments = (passes, index, _shared_objects(passes[index]) if most > 1 else {})
        resources = {"num_cpus": share} if resource == "CPU" else {"num_cpus": 0, "num_gpus": share}
        # One thread works, the other receives units. Ray does not restart workers: only this pool knows which units a
        # lost worker had.
        self._actor = ray.remote(_Worker).options(max_concurrency=2, scheduling_strategy="SPREAD", **resources)  # type: ignore[attr-defined]
        self._failed_starts = 0

    def grow(self, units: int) -> None:
        """Starts as many workers as the cluster has room for and this number of units can keep busy."""
        missing = min(units, self._most, max(1, cluster.capacity(self._resource))) - len(self.workers)
        if missing > 0:
            lost_nodes = cluster.lost_nodes()
            for _ in range(missing):
                self._start(lost_nodes)

    def _start(self, lost_nodes: int) -> None:
        actor = self._actor.remote(*self._arguments)
        self.workers[actor.run.options(num_returns="streaming").remote()] = _WorkerHandle(actor, lost_nodes)  # type: ignore[union-attr]

    def submit_units(self) -> None:
        """Assigns units to the workers with the fewest, at most half of an equal share, so that all end together."""
        ready = [worker for worker in self.workers.values() if worker.ready]
        if not self.backlog or not ready:
            return
        open_units = len(self.backlog) + sum(len(worker.units) for worker in ready)
        most = max(1, min(UNITS_AHEAD, open_units // (2 * len(ready))))
        for level in range(most):
            for worker in ready:
                if len(worker.units) == level and self.backlog:
                    unit = self.backlog.popleft()
                    worker.units.append(unit)
                    worker.actor.submit.remote(unit)

    def receive(self, stream: Any) -> UnitReport:
        """Returns the next report of a worker. If the worker died, its units go back to the backlog."""
        worker = self.workers[stream]
        try:
            report: UnitReport = ray.get(next(stream))
        except (RayActorError, StopIteration) as death:
            if getattr(death, "actor_init_failed", False):  # it cannot load its pass, and no other worker could
                raise
            del self.workers[stream]
            ray.kill(worker.actor)  # it may only be unreachable
            lost_nodes = cluster.lost_nodes()
            if worker.ready:
                self._failed_starts = 0
            # Ray declares a node dead up to 15 s after its workers have become unreachable. A worker that dies alone
            # is reported as dead by its node.
            elif not isinstance(death, ActorUnavailableError) and lost_nodes == worker.lost_nodes:
                self._failed_starts += 1
            if self._failed_starts == MAX_FAILED_STARTS:
                raise RuntimeError(
                    f"{MAX_FAILED_STARTS} workers of {self._label} in a row died before they were ready: is there "
                    "enough memory?"
                ) from None
            self.backlog.extendleft(reversed(worker.units))
            self._start(lost_nodes)
            return UnitReport()
        worker.ready = True
        for record in report.records:
            worker.units.remove(record["unit"])
        return report

    def release(self) -> None:
        """Lets the workers end once they have committed their units."""
        for worker in self.workers.values():
            worker.actor.submit.remote(None)
        self.workers = {}

    def kill(self) -> None:
        """Ends the workers immediately."""
        for worker in self.workers.values():
            ray.kill(worker.actor)
        self.workers = {}


def _shared_objects(p: Pass) -> dict[int, Any]:
    """An actor for each step with an object that its workers share, by the step's number."""
    actors: dict[int, Any] = {}
    for number, step in enumerate(p.steps):
        if (shared := step.shared()) is not None:
            kind, arguments = shared
            actors[number] = ray.remote(num_cpus=0, max_restarts=-1)(kind).remote(*arguments)
    return actors
