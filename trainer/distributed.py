"""Training in several processes: ranks, collectives, and launching on Ray.

A single process, a `torchrun` rank and a Ray Train worker run the same code; with one process,
every collective is the identity.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable
from datetime import timedelta
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch import distributed as dist

from trainer.config import TrainConfig

T = TypeVar("T")


def rank() -> int:
    """The number of this process among those that train together; 0 if it trains alone."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """How many processes train together; 1 if this one trains alone."""
    return dist.get_world_size() if dist.is_initialized() else 1


def join(device: torch.device) -> torch.device:
    """Joins the process group that the environment describes (set by `torchrun`); returns this rank's device."""
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
    if int(os.environ.get("WORLD_SIZE", 1)) > 1 and not dist.is_initialized():
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    return device


def leave() -> None:
    """Leaves the process group, if this process joined one."""
    if dist.is_initialized():
        dist.destroy_process_group()


def sum_of(values: Tensor) -> Tensor:
    """The elementwise sum over the ranks."""
    return _reduced(values, dist.ReduceOp.SUM)


def max_of(values: Tensor) -> Tensor:
    """The elementwise maximum over the ranks."""
    return _reduced(values, dist.ReduceOp.MAX)


def _reduced(values: Tensor, operation: Any) -> Tensor:
    if world_size() > 1:
        values = values.clone()
        dist.all_reduce(values, operation)
    return values


def rows_of(rows: Tensor) -> Tensor:
    """The rows (n, D) of all ranks concatenated, (ranks x n, D)."""
    if world_size() == 1:
        return rows
    gathered = [torch.empty_like(rows) for _ in range(world_size())]
    dist.all_gather(gathered, rows.contiguous())
    return torch.cat(gathered)


def lists_of(items: list[T]) -> list[T]:
    """The items of all ranks, concatenated."""
    if world_size() == 1:
        return items
    gathered: list[list[T]] = [[] for _ in range(world_size())]
    dist.all_gather_object(gathered, items)
    return [item for items in gathered for item in items]


def on_first(work: Callable[[], T], group: Any = None) -> T:
    """Runs `work` on rank 0 and returns its result on every rank; an error is raised on every rank too."""
    if world_size() == 1:
        return work()
    box: list[Any] = [None, None]
    if rank() == 0:
        try:
            box[0] = work()
        except Exception as error:
            box[1] = error
    dist.broadcast_object_list(box, group=group)
    if box[1] is not None:
        raise box[1]
    result: T = box[0]
    return result


def patient_group() -> Any:
    """A group of all ranks for `on_first`, with a timeout of a day; the default timeout is 10 to 30 minutes."""
    return dist.new_group(backend="gloo", timeout=timedelta(days=1)) if world_size() > 1 else None


def on_ray(train: Callable[[TrainConfig], Any], config: TrainConfig) -> None:
    """Calls `train` in `config.ranks` Ray Train workers, on the cluster at RAY_ADDRESS or one started here.

    Raises what the training raises. Every node must see the same `shards` and `output`.
    """
    import ray
    from ray.train import RunConfig, ScalingConfig, WorkerGroupError
    from ray.train.torch import TorchConfig, TorchTrainer

    ray.init(ignore_reinit_error=True)
    gpu = config.device != "cpu" and ray.cluster_resources().get("GPU", 0) > 0
    # Ray's workers have their own working directory.
    paths: dict[str, Any] = {key: _absolute(getattr(config, key)) for key in ("output", "shards")}
    paths |= {key: _absolute_where_found(getattr(config, key)) for key in ("pretrained", "evaluate")}
    if config.subset:
        paths["subset"] = _absolute(config.subset)
    if config.resume not in ("latest", "none"):
        paths["resume"] = _absolute(config.resume)
    config = dataclasses.replace(config, **paths)
    trainer = TorchTrainer(
        lambda: train(config),
        scaling_config=ScalingConfig(num_workers=config.ranks or 1, use_gpu=gpu),
        torch_config=TorchConfig(backend="nccl" if gpu else "gloo"),
        run_config=RunConfig(name="ray", storage_path=paths["output"]),
    )
    try:
        trainer.fit()
    except WorkerGroupError as error:
        raise next(iter(error.worker_failures.values())) from None


def _absolute(path: Any) -> Any:
    # A mixture has a path per source. `open_shards` reports invalid entries.
    if isinstance(path, list):
        return [_absolute(source) for source in path]
    if isinstance(path, dict):
        return {key: _absolute(value) if key == "path" else value for key, value in path.items()}
    return os.path.abspath(path) if isinstance(path, str) and "://" not in path else path


def _absolute_where_found(value: Any) -> Any:
    if isinstance(value, list):
        return [_absolute_where_found(part) for part in value]
    if isinstance(value, dict):
        return {key: _absolute_where_found(part) for key, part in value.items()}
    return os.path.abspath(value) if isinstance(value, str) and os.path.exists(value) else value
