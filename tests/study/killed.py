"""Runs a study that kills itself at a chosen call: `python tests/study/killed.py PLACE STUDY.yaml [key=value ...]`.

The study dies within one of its own calls, so the place does not depend on the speed of the machine.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.reader import Run
from pipeline.storage import Store
from pipeline.study.__main__ import main
from pipeline.study.arms import _Worker


def die(*_: Any) -> Any:
    os.kill(os.getpid(), signal.SIGKILL)


def nth(owner: Any, name: str, number: int) -> None:
    """Dies at call number `number` of a function."""
    original, calls = getattr(owner, name), iter(range(1, number))

    def counted(*args: Any, **options: Any) -> Any:
        return original(*args, **options) if next(calls, None) else die()

    setattr(owner, name, counted)


def scan(column: str) -> None:
    """Dies after the first unit of a scan that reads only this column."""
    original = Run.scan

    def broken(self: Run, columns: Any, *args: Any, **options: Any) -> Iterator[pa.Table]:
        for number, table in enumerate(original(self, columns, *args, **options)):
            if number and columns == [column]:
                die()
            yield table

    setattr(Run, "scan", broken)  # noqa: B010


def training() -> None:
    """Dies during the training of an arm, as soon as a checkpoint exists."""

    def run(self: _Worker, order: dict[str, Any]) -> Any:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(order) + "\n")
        self.process.stdin.flush()
        while not [*(Path(order["config"]["output"]) / "checkpoints").glob("step-*.pt")]:
            time.sleep(0.001)
        die()

    setattr(_Worker, "run", run)  # noqa: B010


PLACES: dict[str, Callable[[], None]] = {
    "the columns are spooled": lambda: scan("clip_score"),
    "the pictures are indexed": lambda: scan("caption"),
    "the first arm is trained": training,
    "the third arm is trained and not recorded": lambda: nth(Store, "create", 3),
    "one of the tables is written": lambda: nth(pq, "write_table", 2),
}

if __name__ == "__main__":
    PLACES[sys.argv[1]]()
    sys.exit(main(sys.argv[2:]))
