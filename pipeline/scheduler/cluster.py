"""Joins or starts the Ray cluster of a run, and checks that its nodes can access its directory and files."""

from __future__ import annotations

import contextlib
import logging
import os
import secrets
import socket
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import ray
from ray.exceptions import NodeDiedError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from pipeline.scheduler.keeper import Keeper
from pipeline.scheduler.lifetime import GOES_ON, PROBE_SECONDS
from pipeline.storage import Store

TOKENS = "nodes"
"""The folder in a run directory in which nodes write files to prove access; removed afterwards."""
OOM_RETRIES = 8
"""Retries of a task that was killed because memory ran out. Ray waits 1 s before the first retry and doubles the wait
each time, 4 minutes in all. By default it retries forever. A joined cluster keeps its own setting."""
NODE_SECONDS = 120.0
"""Seconds within which a node must answer. It may have to start a worker and unpack an environment first."""
STARTS = 3
"""Attempts to start Ray on this machine. Ray gives each one 30 s, which a busy machine may exceed."""

_CANNOT_RUN = "cannot run Winnow"

_keeper: Keeper | None = None


class StartError(Exception):
    """Ray could not be started or joined."""


def start_ray(workers: int | None, say: Callable[[str], None]) -> None:
    """Joins the cluster at RAY_ADDRESS (set by `ray job submit`), or starts Ray on this machine.

    A Ray started here ends with this process, however it ends. A joined cluster keeps running. `say` prints a line.
    Raises StartError.
    """
    global _keeper
    if joined():
        address = os.environ["RAY_ADDRESS"]
        _probe(address)
        try:
            _init(address=address)
        except Exception as error:
            raise StartError(f"{_failure(error)} {GOES_ON}") from error
    else:
        store_bytes = 1 << 30  # holds only columns of barriers, and spills to disk
        _keeper = start_local(max(workers or os.cpu_count() or 1, 1), store_bytes, say)


def start_local(cpus: int, store_bytes: int, say: Callable[[str], None]) -> Keeper:
    """Starts Ray on this machine and retries if that fails. Ending the returned keeper kills all of Ray's processes.

    `say` prints a line for each new attempt. Raises StartError after STARTS attempts.
    """
    for attempt in range(2, STARTS + 1):
        try:
            return _start_once(cpus, store_bytes)
        except Exception as error:
            say(f"{_failure(error)} Starting it again, attempt {attempt} of {STARTS}.")
    try:
        return _start_once(cpus, store_bytes)
    except Exception as error:
        raise StartError(f"{_failure(error)} {GOES_ON}") from error


def _start_once(cpus: int, store_bytes: int) -> Keeper:
    """Starts Ray once. Leaves no process behind if that fails."""
    keeper = Keeper()
    try:
        _init(
            address="local", num_cpus=cpus, include_dashboard=False, object_store_memory=store_bytes,
            # A task process takes 1 s to start. Keeping idle ones for two minutes bridges a short actor pass without
            # holding memory during a long one.
            _system_config={"idle_worker_killing_time_threshold_ms": 120_000, "task_oom_retries": OOM_RETRIES},
        )  # fmt: skip
    except BaseException as error:
        if isinstance(error, Exception):  # a signal leaves no time for it
            ray.shutdown()
        keeper.end()
        raise
    keeper.started()
    return keeper


def _failure(error: Exception) -> str:
    """One line with Ray's reason: a component died, or the machine is too busy."""
    return f"Ray did not start: {str(error).partition(chr(10))[0]}"


def _init(**options: Any) -> None:
    """Calls `ray.init`, silently unless WINNOW_DEBUG is set."""
    debug = bool(os.environ.get("WINNOW_DEBUG"))
    with contextlib.nullcontext() if debug else _quiet_core():
        ray.init(logging_level=logging.ERROR, log_to_driver=debug, **options)


def _probe(address: str) -> None:
    """Raises StartError if nothing answers at `host:port`. Ray itself would retry for minutes."""
    host, _, port = address.rpartition(":")
    if host and "/" not in address and port.isdigit():
        try:
            socket.create_connection((host.strip("[]"), int(port)), PROBE_SECONDS).close()
        except OSError as error:
            raise StartError(f"no cluster answers at RAY_ADDRESS={address} ({error.strerror or error})") from None


def joined() -> bool:
    """Whether the run joins an existing cluster (RAY_ADDRESS is set)."""
    return bool(os.environ.get("RAY_ADDRESS"))


def lost_nodes() -> int:
    """Number of nodes that have left the cluster, cleanly or not."""
    return sum(not node["Alive"] for node in ray.nodes())


def capacity(kind: str) -> int:
    """Current total of a resource ("CPU" or "GPU") over all nodes."""
    return int(ray.cluster_resources().get(kind, 0))


@contextlib.contextmanager
def _quiet_core() -> Iterator[None]:
    """Silences stderr while Ray's core starts. No error is lost: a failure to start is raised as well."""
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
    sys.stderr.flush()
    stderr, devnull = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(devnull, 2)
    try:
        yield
    finally:
        os.dup2(stderr, 2)
        os.close(stderr)
        os.close(devnull)


def stop_ray(take_signals: Callable[[], None], orderly: bool = True) -> None:
    """Leaves the cluster. If `start_ray` started it, ends all its processes. Call it in the main thread.

    `take_signals` installs the signal handlers. It is called repeatedly, because Ray removes the SIGTERM handler when
    its shutdown begins, which then takes another second. `orderly=False` skips Ray's own shutdown, which would wait for
    a lost cluster.
    """
    global _keeper
    if orderly:
        shutdown = threading.Thread(target=ray.shutdown, name="shutdown of Ray", daemon=True)
        shutdown.start()
        while shutdown.is_alive():
            take_signals()
            shutdown.join(0.01)
        take_signals()
    if _keeper is not None:
        _keeper.end()
        _keeper = None


def cluster_parts() -> dict[str, tuple[str, int]]:
    """Addresses of the components that this process depends on: the cluster's GCS and the raylet of its node."""
    context = ray.get_runtime_context()
    host, _, port = context.gcs_address.rpartition(":")
    parts = {"the head node (GCS)": (host.strip("[]"), int(port))}
    for node in ray.nodes():
        if node["NodeID"] == context.get_node_id():
            parts["the raylet of this node"] = (node["NodeManagerAddress"], node["NodeManagerPort"])
    return parts


class UnseenError(Exception):
    """A node of the cluster cannot access the run directory, or a file of the recipe."""


def check_nodes(store: Store, files: Sequence[str]) -> None:
    """Raises UnseenError unless every node with workers can read and write the run directory and sees all `files`.

    Each node reads a token from the run directory and writes a file that this process reads back. Nodes that join later
    are not checked.
    """
    if not joined():
        return
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
            store, token, node, files
        ): node
        for node in nodes
    }
    silent: list[Any] = []
    try:
        _, silent = ray.wait(list(asked), num_returns=len(asked), timeout=NODE_SECONDS)
        for answer, node in asked.items():
            problem = f"did not answer within {NODE_SECONDS:.0f} s" if answer in silent else _answer_of(answer)
            if not problem and store.read_if_there(f"{TOKENS}/{token}.{node}") != token.encode():
                problem = f"writes to another {store.root} than this process"
            if problem:
                cure = (
                    "Install the same environment on every node"
                    if problem.startswith(_CANNOT_RUN)
                    else "Put pool, run and files of steps where every node can access them: in an object store "
                    "(s3://, gs://) or on a file system mounted at the same path"
                )
                raise UnseenError(f"the node {nodes[node]} {problem}. {cure}. See docs/cluster.md")
    finally:
        for answer in silent:  # canceling a task that has just ended can abort this process (Ray 2.60)
            ray.cancel(answer)
        for name in store.names(TOKENS):
            store.remove(f"{TOKENS}/{name}")
        if store.local:
            with contextlib.suppress(OSError):
                os.rmdir(store.path(TOKENS))


def _look(store: Store, token: str, node: str, files: Sequence[str]) -> str:
    """Runs on a node. Returns the problem found there, or an empty string."""
    try:
        if store.read_if_there(f"{TOKENS}/{token}") != token.encode():
            return f"does not see {store.root}, which this process writes to"
        store.write(f"{TOKENS}/{token}.{node}", token.encode())
        missing = [file for file in files if not os.path.exists(file)]
        return f"does not see {missing[0]}, which the recipe names" if missing else ""
    except Exception as error:
        return f"cannot use {store.root}: {type(error).__name__}: {error}"


def _answer_of(answer: Any) -> str:
    """The result of `_look`, or a description of why it failed."""
    try:
        return str(ray.get(answer))
    except (NodeDiedError, ray.exceptions.TaskUnschedulableError):
        return "was lost during the check"
    except Exception as error:
        cause = getattr(error, "cause", None) or error
        return f"{_CANNOT_RUN}: {type(cause).__name__}: {str(cause).strip().splitlines()[-1]}"
