"""The process that trains arms: reads one order per line from standard input, answers each with a line.

It imports torch once for all its arms, and ends with the study, because its input ends then.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import signal
import sys
import threading
from pathlib import Path
from typing import Any


def train(config: dict[str, Any]) -> dict[str, float]:
    """Trains a model and returns the metrics of its tasks after the last step."""
    from trainer import distributed, loop
    from trainer.config import TrainConfig

    if config["ranks"]:
        distributed.on_ray(loop.train, TrainConfig(**config))
    else:
        loop.train(TrainConfig(**config))
    metrics: dict[str, float] = {}
    steps = config["samples"] // config["batch_size"]
    for line in (Path(config["output"]) / "metrics.jsonl").read_text(encoding="utf-8").splitlines():
        record = json.loads(line)
        if record["step"] == steps:
            metrics |= {name: value for name, value in record.items() if isinstance(value, int | float)}
    for name in ("step", "epoch", "samples", "samples_per_second", "data_wait", "lr", "corrupt"):
        metrics.pop(name, None)
    return metrics


def main() -> None:
    """Trains arms until standard input ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C also reaches the study, which ends this process
    orders: queue.SimpleQueue[bytes] = queue.SimpleQueue()

    def listen() -> None:
        # Reads the descriptor, because a thread in `sys.stdin` holds its lock, and a forked loader would wait for it.
        pending = b""
        while data := os.read(0, 1 << 16):
            *lines, pending = (pending + data).split(b"\n")
            for line in lines:
                orders.put(line)
        os._exit(1)  # the study has ended, so nothing waits for the arm in progress

    threading.Thread(target=listen, daemon=True).start()
    answers = sys.stdout
    while True:
        config = json.loads(orders.get())["config"]
        output = Path(config["output"])
        output.mkdir(parents=True, exist_ok=True)
        with (output / "log.txt").open("a") as log, contextlib.redirect_stdout(log), contextlib.redirect_stderr(log):
            try:
                answer: dict[str, Any] = {"metrics": train(config)}
            except Exception as error:
                answer = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main()
