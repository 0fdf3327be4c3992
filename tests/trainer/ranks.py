"""One rank of a sharded loss. It has few imports, because every process that a test spawns imports it."""

from __future__ import annotations

from typing import Any

import torch
from torch import distributed as dist

from trainer import loss


def check_loss(rank: int, folder: str, cases: dict[str, Any]) -> None:
    """Computes the loss of this process's part of a batch and its gradients, first with 4 ranks and then with 2."""
    torch.set_num_threads(1)
    for world in (4, 2):
        if rank >= world:
            return
        dist.init_process_group("gloo", init_method=f"file://{folder}/{world}", rank=rank, world_size=world)
        for kind, (whole, value, gradients) in cases.items():
            count = len(whole[0])
            own = slice(rank * count // world, (rank + 1) * count // world)
            for rows in (1, 3, count):
                loss.LOGITS_AT_ONCE = rows * count
                inputs = [v[own].clone().requires_grad_() for v in whole[:2]]
                inputs += [v.clone().requires_grad_() for v in whole[2:]]
                got = loss.clip_loss(*inputs[:3])[0] if kind == "clip" else loss.siglip_loss(*inputs)[0]
                got.backward()
                torch.testing.assert_close(got.detach(), value)
                # Scaled by the number of ranks, because the gradients are averaged over the ranks afterwards.
                for v, gradient in zip(inputs[:2], gradients):
                    torch.testing.assert_close(v.grad / world, gradient[own], atol=5e-6, rtol=1e-5)
                for v, gradient in zip(inputs[2:], gradients[2:]):
                    if gradient is not None:
                        dist.all_reduce(v.grad)
                        torch.testing.assert_close(v.grad / world, gradient, atol=5e-6, rtol=1e-5)
        dist.destroy_process_group()
