"""Workers on Ray, and how units get to them.

Only the numbers of units and small accounts of what became of them travel; what a unit holds goes through the run's
storage. A driver or a worker may die at any moment: what counts is in the units' commit records.
"""

from __future__ import annotations

import contextlib
import gc
import logging
import math
import os
import queue
import secrets
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain, islice
from typing import Any, TypeVar

import ray
from ray.exceptions import NodeDiedError, RayActorError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from pipeline import isolation
from pipeline.fetch.hosts import Ask, Grant, HostLimiter
from pipeline.fetch.outage import OutageError
from pipeline.keeper import Keeper
from pipeline.passes import Advance, Pass, committed, run_pass
from pipeline.stages.download import Download
from pipeline.storage import Store

T = TypeVar("T")

AHEAD = 4
"""Units that a worker has at most: one runs out, one is at work, and the next are there when it has room for them."""
TELL_EVERY = 0.5
"""Seconds between two accounts of a worker in the middle of a unit."""
GROW_EVERY = 10.0
"""Seconds between two looks at whether there is room for more workers: nodes may come when a run has long begun."""
TOKENS = "nodes"
"""The folder in a run directory where nodes show that they see it; gone when they have."""
NODE_SECONDS = 120.0
"""In which a node must answer: it may have to start a worker and unpack an environment first."""
STARTS = 3
"""Workers of a crew in a row that die before they are ready: one may be bad luck, this many are not."""


_keeper: Keeper | None = None


def start_ray(workers: int | None) -> None:
    """Joins the cluster that RAY_ADDRESS names (as under `ray job submit`), or starts Ray on this machine.

    A Ray that was started here ends with this process, whatever ends the process; one that was joined stays.
    """
    global _keeper
    debug = bool(os.environ.get("WINNOW_DEBUG"))
    options: dict[str, Any] = {"logging_level": logging.ERROR, "log_to_driver": debug}
    if _joins():
        options["address"] = os.environ["RAY_ADDRESS"]
    else:
        _keeper = Keeper()
        store_bytes = 1 << 30  # only columns of barriers go through it, and it spills
        cpus = max(workers or os.cpu_count() or 1, 1)
        options |= {
            "address": "local",
            "num_cpus": cpus,
            "include_dashboard": False,
            "object_store_memory": store_bytes,
            # A process for tasks, of which some come before and some behind a pass of actors, takes a second to start:
            # it outlives a short pass, and is dead weight in a long one.
            "_system_config": {"idle_worker_killing_time_threshold_ms": 120_000},
        }
    with contextlib.nullcontext() if debug else _quiet_core():
        ray.init(**options)


def _joins() -> bool:
    return bool(os.environ.get("RAY_ADDRESS"))


def _there(kind: str) -> int:
    """CPUs or GPUs of all nodes that are there now."""
    return int(ray.cluster_resources().get(kind, 0))


@contextlib.contextmanager
def _quiet_core() -> Iterator[None]:
    """Ray's core announces on stderr how it could be silenced.

    A failure to start is raised, not only logged, so nothing is lost.
    """
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
    sys.stderr.flush()
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)


def stop_ray(orderly: bool = True) -> None:
    """Leaves the cluster; ends the Ray that `start_ray` started, with all its processes.

    Not `orderly`: without a word to the cluster, which may be gone and would be waited for.
    """
    global _keeper
    if orderly:
        ray.shutdown()
    if _keeper is not None:
        _keeper.end()
        _keeper = None


def cluster_parts() -> dict[str, tuple[str, int]]:
    """What this process cannot do without, by name: the addresses of the GCS and of its own node's raylet."""
    here = ray.get_runtime_context()
    host, _, port = here.gcs_address.rpartition(":")
    parts = {"the head node (GCS)": (host.strip("[]"), int(port))}
    for node in ray.nodes():
        if node["NodeID"] == here.get_node_id():
            parts["the raylet of this node"] = (node["NodeManagerAddress"], node["NodeManagerPort"])
    return parts


class UnseenError(Exception):
    """A node of the cluster does not see the folders of the run or of the pool as this process does."""


def check_nodes(store: Store, files: Sequence[str]) -> None:
    """UnseenError unless every node with workers reads and writes the run directory and reads the files of the pool.

    Each node reads a token from the run directory and answers with a file of its own, which is read here. What joins
    later is not asked.
    """
    if not _joins():
        return
    places = [file for file in files if "://" not in file][:1]
    token = secrets.token_hex(8)
    store.write(f"{TOKENS}/{token}", token.encode())
    nodes = {
        node["NodeID"]: f"{node['NodeManagerAddress']} ({node['NodeManagerHostname']}, {node['NodeID'][:8]})"
        for node in ray.nodes()
        if node["Alive"] and (node["Resources"].get("CPU") or node["Resources"].get("GPU"))
    }
    look = ray.remote(num_cpus=0, max_retries=1)(_look)
    asked = {
        look.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=False)).remote(
            store, token, node, places
        ): node
        for node in nodes
    }
    try:
        _, silent = ray.wait(list(asked), num_returns=len(asked), timeout=NODE_SECONDS)
        for answer, node in asked.items():
            problem = f"gave no answer within {NODE_SECONDS:.0f} s" if answer in silent else _answer_of(answer)
            if not problem and store.read_if_there(f"{TOKENS}/{token}.{node}") != token.encode():
                problem = f"writes to another {store.root} than this process"
            if problem:
                raise UnseenError(
                    f"the node {nodes[node]} {problem}. Pool and run must be in a place that every node sees: an "
                    "object store (s3://, gs://) or a shared file system under the same path. See docs/cluster.md"
                )
    finally:
        for answer in asked:
            ray.cancel(answer)
        for name in store.names(TOKENS):
            store.remove(f"{TOKENS}/{name}")
        if store.local:
            with contextlib.suppress(OSError):
                os.rmdir(store.path(TOKENS))


def _look(store: Store, token: str, node: str, files: Sequence[str]) -> str:
    """On the node: what is wrong there, or nothing."""
    try:
        if store.read_if_there(f"{TOKENS}/{token}") != token.encode():
            return f"does not see {store.root}, which this process writes to"
        store.write(f"{TOKENS}/{token}.{node}", token.encode())
        missing = [file for file in files if not os.path.exists(file)]
        return f"does not see {missing[0]}, a file of the pool" if missing else ""
    except Exception as error:
        return f"cannot use {store.root}: {type(error).__name__}: {error}"


def _answer_of(answer: Any) -> str:
    try:
        return str(ray.get(answer))
    except (NodeDiedError, ray.exceptions.TaskUnschedulableError):
        return "was lost while it was asked"
    except Exception as error:
        cause = getattr(error, "cause", None) or error
        return f"cannot run Winnow: {type(cause).__name__}: {str(cause).strip().splitlines()[-1]}"


def over(
    items: Sequence[T], work: Callable[[Sequence[T]], Iterable[dict[str, Any]]], at_once: int = 1
) -> Iterator[dict[str, Any]]:
    """Hands items to `work` on the cluster, `at_once` a task; yields the records that come back, in any order.

    For pure functions with nothing to set up; Ray tries them again when a worker dies.
    """

    @ray.remote(num_cpus=1)
    def task(some: Sequence[T]) -> list[dict[str, Any]]:
        return list(work(some))

    starts = iter(range(0, len(items), at_once))
    running: list[Any] = []
    while True:
        room = max(0, 2 * _there("CPU") + 2 - len(running))
        running += [task.remote(items[i : i + at_once]) for i in islice(starts, room)]
        if not running:
            return
        (done,), running = ray.wait(running, num_returns=1)
        yield from ray.get(done)


def stream(
    passes: list[Pass], numbers: Sequence[int], units: int, workers: int | None
) -> Iterator[tuple[int, Advance]]:
    """Sends units 0 … `units` − 1 through neighbouring passes, each of which has a crew of its own: while one downloads
    a unit, the next scores those that are done. Yields the numbers of passes and what has gone on there.
    """
    gpus = _there("GPU")
    resources = {
        i: "GPU" if gpus and any(step.resource == "gpu" for step in passes[i].steps) else "CPU" for i in numbers
    }
    # All crews must fit beside each other, or one would wait for the end of another.
    shares = {"CPU": 1 / max(1, list(resources.values()).count("CPU")), "GPU": 1}
    crews = []
    for i, resource in resources.items():
        # A cluster that was joined may grow; one of our own stays as it is.
        most = min(units, workers or (units if _joins() else _there(resource)))
        crews.append(_Crew(passes, i, most, resource, shares[resource]))
    crews[0].backlog.extend(range(units))
    left = [units] * len(crews)
    looked = -math.inf
    try:
        while any(left):
            if time.monotonic() - looked > GROW_EVERY:
                looked = time.monotonic()
                for crew, open_units in zip(crews, left):
                    crew.grow(open_units)
            for crew in crews:
                crew.hand_out()
            runs = [run for crew in crews for run in crew.workers]
            ray.wait(runs, num_returns=1, timeout=GROW_EVERY)
            ready = set(ray.wait(runs, num_returns=len(runs), timeout=0)[0])
            for place, crew in enumerate(crews):
                for run in ready & crew.workers.keys():
                    advance = crew.hear(run)
                    done = [record["unit"] for record in advance.records]
                    left[place] -= len(done)
                    if place + 1 < len(crews):
                        crews[place + 1].backlog.extend(done)
                    yield crew.index, advance
                if not left[place]:
                    crew.dismiss()
    finally:
        for crew in crews:
            crew.dismiss(now=True)


class _RemoteBoard:
    """The pass's one board of hosts, which lives in an actor, as the client of a worker sees it."""

    def __init__(self, actor: Any) -> None:
        self._actor = actor

    async def exchange(self, worker: str, asks: dict[str, Ask]) -> dict[str, Grant]:
        grants: dict[str, Grant] = await self._actor.exchange.remote(worker, asks)
        return grants


class _Worker:
    """Runs one pass over the units that it is given, as one stream as long as the next is there in time."""

    def __init__(self, passes: list[Pass], index: int, boards: dict[int, Any]) -> None:
        self._passes, self._index, self._boards = passes, index, boards
        self._inbox: queue.SimpleQueue[int | None] = queue.SimpleQueue()

    def give(self, unit: int | None) -> None:
        """More to do; None: there is no more. Called while `run` runs, in another thread."""
        self._inbox.put(unit)

    def run(self) -> Iterator[Advance]:
        """Sets the steps up, says so by an empty account, and works until there is no more."""
        for number, step in enumerate(self._passes[self._index].steps):
            if isinstance(step, Download) and number in self._boards:
                step.limiter = _RemoteBoard(self._boards[number])  # type: ignore[misc]
            step.setup()
        # What is loaded by now stays, and thousands of rows under way are no garbage: the collector took a sixth of a
        # fetching worker's time looking at them.
        gc.collect()
        gc.freeze()
        gc.set_threshold(10_000)
        yield Advance()
        while (unit := self._inbox.get()) is not None:
            yield from _thinned(self._stream(unit))

    def _stream(self, first: int) -> Iterator[Advance]:
        p = self._passes[self._index]
        taken: set[int] = set()
        found: list[dict[str, Any]] = []
        hopeless: list[int] = []

        def fresh() -> Iterator[int]:
            for unit in chain([first], self._arrived()):
                if (record := committed(self._passes[: self._index + 1], unit)) is not None:
                    found.append(record)
                elif isolation.attempt(p, unit) > isolation.ATTEMPTS:
                    hopeless.append(unit)
                else:
                    taken.add(unit)
                    yield unit

        try:
            for advance in run_pass(self._passes, self._index, fresh()):
                taken.difference_update(record["unit"] for record in advance.records)
                yield advance
        except OutageError:
            isolation.forgive(p, taken)
            raise
        for record in found:
            yield Advance.of(record)
        for unit in hopeless:
            yield Advance.of(isolation.run_isolated(self._passes, self._index, unit))

    def _arrived(self) -> Iterator[int]:
        """The units that are there by now."""
        with contextlib.suppress(queue.Empty):
            while True:
                unit = self._inbox.get_nowait()
                if unit is None:
                    self._inbox.put(None)  # for `run` to see
                    return
                yield unit


def _thinned(advances: Iterable[Advance]) -> Iterator[Advance]:
    """The same accounts in fewer: finished units at once, the rest a few times a second at most."""
    held, told = Advance(), time.monotonic()
    for advance in advances:
        held += advance
        if held.records or time.monotonic() - told > TELL_EVERY:
            yield held
            held, told = Advance(), time.monotonic()
    yield held


@dataclass
class _Hand:
    """The driver's side of one worker."""

    actor: Any
    units: list[int] = field(default_factory=list)
    """What it has been given and has not committed, the oldest first."""
    ready: bool = False


class _Crew:
    """The workers of one pass, as the driver sees them."""

    def __init__(self, passes: list[Pass], index: int, most: int, resource: str, share: float) -> None:
        """At most `most` workers, each with a `share` of a CPU or of a GPU, whichever `resource` says."""
        self.index = index
        self.backlog: deque[int] = deque()
        self.workers: dict[Any, _Hand] = {}
        """By the stream of what each has to tell."""
        self._label = passes[index].label
        self._most, self._resource = most, resource
        self._arguments = (passes, index, _boards(passes[index]) if most > 1 else {})
        resources = {"num_cpus": share} if resource == "CPU" else {"num_cpus": 0, "num_gpus": share}
        # One thread works, the other one takes what is given. Ray starts nobody anew: whoever does that must know what
        # was in hand.
        self._kind = ray.remote(_Worker).options(max_concurrency=2, scheduling_strategy="SPREAD", **resources)  # type: ignore[attr-defined]
        self._lost = 0

    def grow(self, units: int) -> None:
        """Starts the workers that are missing, where there is room for them, to do so many units."""
        for _ in range(min(units, self._most, max(1, _there(self._resource))) - len(self.workers)):
            self._start()

    def _start(self) -> None:
        actor = self._kind.remote(*self._arguments)
        self.workers[actor.run.options(num_returns="streaming").remote()] = _Hand(actor)  # type: ignore[union-attr]

    def hand_out(self) -> None:
        """Gives units to those who have few: at most half of an equal share, so that all end at about the same time."""
        able = [hand for hand in self.workers.values() if hand.ready]
        if not self.backlog or not able:
            return
        open_units = len(self.backlog) + sum(len(hand.units) for hand in able)
        most = max(1, min(AHEAD, open_units // (2 * len(able))))
        for level in range(most):  # the emptiest hands first
            for hand in able:
                if len(hand.units) == level and self.backlog:
                    unit = self.backlog.popleft()
                    hand.units.append(unit)
                    hand.actor.give.remote(unit)

    def hear(self, run: Any) -> Advance:
        """The next that a worker has to tell. Of one that died, the units go to another."""
        hand = self.workers[run]
        try:
            advance: Advance = ray.get(next(run))
        except (RayActorError, StopIteration) as death:
            if getattr(death, "actor_init_failed", False):  # it cannot load its pass: no bad luck
                raise
            del self.workers[run]
            ray.kill(hand.actor)  # lest it be only out of reach
            self._lost = 0 if hand.ready else self._lost + 1
            if self._lost == STARTS:
                raise RuntimeError(
                    f"{STARTS} workers of {self._label} in a row died before they were ready: is there enough memory?"
                ) from None
            self.backlog.extendleft(reversed(hand.units))
            self._start()
            return Advance()
        hand.ready = True
        for record in advance.records:
            hand.units.remove(record["unit"])
        return advance

    def dismiss(self, now: bool = False) -> None:
        """Lets the workers go; `now`: whatever they have in hand."""
        for hand in self.workers.values():
            if now:
                ray.kill(hand.actor)
            else:
                hand.actor.give.remote(None)
        self.workers = {}


def _boards(p: Pass) -> dict[int, Any]:
    """An actor for each step whose workers must agree about hosts, by the step's number."""
    actor = ray.remote(num_cpus=0, max_restarts=-1)(HostLimiter)
    return {n: actor.remote(step.per_host) for n, step in enumerate(p.steps) if isinstance(step, Download)}
