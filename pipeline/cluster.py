"""The Ray cluster under a run: joined or started here, what of it this process depends on, and what its nodes see."""

from __future__ import annotations

import contextlib
import logging
import os
import secrets
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import ray
from ray.exceptions import NodeDiedError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from pipeline.keeper import Keeper
from pipeline.storage import Store

TOKENS = "nodes"
"""The folder in a run directory in which nodes prove that they see it; removed afterwards."""
NODE_SECONDS = 120.0
"""Seconds that a node has to answer: it may first have to start a worker and unpack an environment."""

_keeper: Keeper | None = None


def start_ray(workers: int | None) -> None:
    """Joins the cluster that RAY_ADDRESS names (as under `ray job submit`), or starts Ray on this machine.

    A Ray started here ends with this process, however the process ends. A cluster that was joined keeps running.
    """
    global _keeper
    debug = bool(os.environ.get("WINNOW_DEBUG"))
    options: dict[str, Any] = {"logging_level": logging.ERROR, "log_to_driver": debug}
    if joined():
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
            # A process for tasks takes a second to start. Keeping it for two minutes carries it over a short pass of
            # actors; in a long pass it would only hold memory.
            "_system_config": {"idle_worker_killing_time_threshold_ms": 120_000},
        }
    with contextlib.nullcontext() if debug else _quiet_core():
        ray.init(**options)


def joined() -> bool:
    """Whether the run joins a cluster instead of starting Ray by itself."""
    return bool(os.environ.get("RAY_ADDRESS"))


def capacity(kind: str) -> int:
    """CPUs or GPUs ("CPU", "GPU") of all nodes in the cluster at present."""
    return int(ray.cluster_resources().get(kind, 0))


@contextlib.contextmanager
def _quiet_core() -> Iterator[None]:
    """Silences stderr while Ray's core starts. A failure to start is raised as well as logged, so nothing is lost."""
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
    """Leaves the cluster, and ends the Ray that `start_ray` started with all its processes.

    `orderly=False` skips Ray's own shutdown, which would wait for a cluster that is gone.
    """
    global _keeper
    if orderly:
        ray.shutdown()
    if _keeper is not None:
        _keeper.end()
        _keeper = None


def cluster_parts() -> dict[str, tuple[str, int]]:
    """Addresses of the cluster's parts that this process depends on: the GCS and the raylet of its node."""
    here = ray.get_runtime_context()
    host, _, port = here.gcs_address.rpartition(":")
    parts = {"the head node (GCS)": (host.strip("[]"), int(port))}
    for node in ray.nodes():
        if node["NodeID"] == here.get_node_id():
            parts["the raylet of this node"] = (node["NodeManagerAddress"], node["NodeManagerPort"])
    return parts


class UnseenError(Exception):
    """A node of the cluster does not see the run directory or the pool that this process sees."""


def check_nodes(store: Store, files: Sequence[str]) -> None:
    """UnseenError unless every node with workers reads and writes the run directory and reads the files of the pool.

    Each node reads a token from the run directory and writes a file of its own, which is read here. Nodes that join
    later are not checked.
    """
    if not joined():
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
    """Runs on the node. Returns what is wrong there, or an empty string."""
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
