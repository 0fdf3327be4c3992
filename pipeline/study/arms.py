"""Trains the arms of a study: a model for each subset, budget and seed.

An arm is named by a hash of everything that determines its result, and its result is one small record, created
exclusively. So a killed study resumes where it stopped, arms with the same subset are trained once, and further seeds
or cuts only add arms. A subset is a list of sample numbers in an index of the pictures, which stay where the run stored
them.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import queue
import shutil
import subprocess
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.child import start_child
from pipeline.storage import Store
from pipeline.study.candidates import Candidates
from pipeline.study.kept import largest
from pipeline.study.study_plan import StudyError, Training
from pipeline.text.hashing import hash64
from trainer import atomic
from trainer.config import FREE_ON_RESUME, TrainConfig
from trainer.errors import FailedError
from trainer.shards import ABSENT, PICTURES_FORMAT
from trainer.terminal import progress


class ArmError(FailedError):
    """A training failed. The message names the arm, the cause and the log."""


@dataclass(frozen=True)
class Arm:
    """One training."""

    key: str
    subset: str
    """The path of a file of sample numbers."""
    samples: int
    """Distinct samples in the subset."""
    budget: int
    """Samples seen in the training."""
    seed: int


def index_pictures(candidates: Candidates, folder: Path) -> np.ndarray:
    """Writes the index through which the trainer (`trainer.shards`) reads the candidates' pictures; copies no picture.

    Returns the sample number of each candidate, int64 (n,), −1 for one without a picture. Within a unit, samples are
    numbered in the order of the files that contain their pictures.
    """
    numbers_at, described_at = folder / "samples.npy", folder / "pictures.json"
    if described_at.exists():
        return np.load(numbers_at, mmap_mode="r")
    folder.mkdir(parents=True, exist_ok=True)
    numbers = np.full(len(candidates), -1, np.int64)
    files: list[dict[str, Any]] = []
    digest, count, caption_at = hashlib.sha256(), 0, 0
    with (folder / "rows.part").open("wb") as rows, (folder / "captions.txt").open("wb") as captions:
        texts = candidates.run.scan(["caption"], after=candidates.after)
        texts = progress(texts, len(candidates.counts), "units: index of pictures")
        for (unit, at), table in zip(candidates.units, texts):
            if at.start == at.stop:
                continue
            entries, ranges = candidates.run.picture_ranges(unit, candidates.rows[at])
            encoded = [caption.encode() for caption in table["caption"].to_pylist()]
            sizes = np.array([len(caption) for caption in encoded], np.int64)
            begins = caption_at + np.append(0, np.cumsum(sizes + 1)[:-1])
            captions.write(b"".join(caption + b"\n" for caption in encoded))
            caption_at += int((sizes + 1).sum())
            order = np.argsort(ranges[:, 0], kind="stable")
            order = order[ranges[order, 2] > 0]
            numbers[at.start + order] = count + np.arange(len(order))
            count += len(order)
            absent = np.full(len(order), ABSENT, np.int64)
            block = np.stack([ranges[order, 1], ranges[order, 2], absent, absent, begins[order], sizes[order]], axis=1)
            rows.write(block.tobytes())
            digest.update(block.tobytes())
            counts = np.bincount(ranges[order, 0], minlength=len(entries))
            for entry, samples in zip(entries, counts.tolist()):
                if samples:
                    name = entry["name"] if "://" in entry["name"] else str(Path(entry["name"]).resolve())
                    files.append({"url": name, "bytes": entry["bytes"], "sha256": entry["sha256"], "samples": samples})
    index = np.memmap(folder / "rows.part", np.int64, "r", shape=(count, 6)) if count else np.empty((0, 6), np.int64)
    np.save(folder / "index.npy", index)
    (folder / "rows.part").unlink()
    np.save(numbers_at, numbers)
    described = {"format": PICTURES_FORMAT, "name": candidates.run.name, "index": digest.hexdigest(), "files": files}
    with atomic.replacing(described_at) as file:  # last: its existence means that the other files are complete
        file.write(json.dumps(described).encode())
    return numbers


def random_places(candidates: Candidates, numbers: np.ndarray, size: int, seed: int) -> np.ndarray:
    """Draws `size` candidates with a picture: those with the highest hash of seed and uid. Returns their places, int64,
    ascending. A smaller sample is thus part of a larger one of the same seed, and neither depends on units or the order
    of rows."""
    hashes = candidates.spooled(
        f"random-{seed}", np.uint64, ["uid"], lambda table: hash64(table["uid"], seed=seed, purpose="study")
    )
    usable = int(sum((numbers[at] >= 0).sum() for at in candidates.blocks))
    [(lowest, _, _)] = largest(lambda: (hashes[at][numbers[at] >= 0] for at in candidates.blocks), usable, [size])
    chosen = [at.start + np.flatnonzero((hashes[at] >= lowest) & (numbers[at] >= 0)) for at in candidates.blocks]
    kept = np.concatenate(chosen)
    tied = kept[hashes[kept] == lowest]  # more than one only if the pool repeats a uid
    return np.setdiff1d(kept, tied[: len(kept) - size])


def write_subset(places: np.ndarray, numbers: np.ndarray, folder: Path) -> tuple[str, int]:
    """Writes the sample numbers of these candidates to a file named by their hash. Returns its path and their count."""
    samples = np.sort(numbers[places])
    samples = samples[samples >= 0]
    path = folder / f"{hashlib.sha256(samples.tobytes()).hexdigest()[:16]}.npy"
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        with atomic.replacing(path) as file:
            np.save(file, samples)
    return str(path), len(samples)


class Trainer:
    """Trains the arms of a study, in worker processes that are reused for all of them."""

    def __init__(self, training: Training, config: TrainConfig, pictures: Path, out: Path) -> None:
        self.training, self.config, self.out = training, config, out
        self.pictures = pictures
        self.store = Store(str(out / "arms"))
        described = json.loads((pictures / "pictures.json").read_text())
        left_out = FREE_ON_RESUME | {"samples", "epochs", "seed"}  # without effect, or set by the study for each arm
        defaults = {field.name: field.default for field in dataclasses.fields(config)}
        fixed = {k: v for k, v in dataclasses.asdict(config).items() if k not in left_out and v != defaults[k]}
        determines = [fixed, training.evaluate, described["index"], [entry["sha256"] for entry in described["files"]]]
        self.identity = json.dumps(determines, sort_keys=True, default=str)

    def arm(self, subset: str, samples: int, budget: int, seed: int) -> Arm:
        """The arm with this subset, budget and seed, named by a hash of all that determines its result."""
        key = hashlib.sha256(json.dumps([self.identity, Path(subset).name, budget, seed]).encode()).hexdigest()[:16]
        return Arm(key, subset, samples, budget, seed)

    def result(self, arm: Arm) -> dict[str, Any] | None:
        """The record of an arm; None if it has not been trained."""
        data = self.store.read_if_there(f"{arm.key}.json")
        return None if data is None else dict(json.loads(data))

    def train(self, arms: Sequence[Arm], say: Callable[[Arm, dict[str, Any]], None]) -> None:
        """Trains the arms that have no record yet, `workers` at a time, and calls `say` after each.

        Raises ArmError if a training fails, and StudyError if the deciding metric is not among the results.
        """
        due = []
        for arm in dict.fromkeys(arms):
            if (record := self.result(arm)) is None:
                due.append(arm)
            else:
                check_metric(record, self.training.metric)
        if not due:
            return
        idle: queue.SimpleQueue[_Worker] = queue.SimpleQueue()
        workers = [_Worker() for _ in range(min(self.training.workers, len(due)))]
        for worker in workers:
            idle.put(worker)
        lock, stop = threading.Lock(), threading.Event()

        def run(arm: Arm) -> None:
            if stop.is_set():
                return
            worker = idle.get()
            try:
                record = worker.run(self._order(arm))
                check_metric(record, self.training.metric)
                self.store.create(f"{arm.key}.json", json.dumps(record).encode())
                shutil.rmtree(self.out / "training" / arm.key, ignore_errors=True)
                with lock:
                    say(arm, record)
            except BaseException:
                stop.set()
                raise
            finally:
                idle.put(worker)

        try:
            with ThreadPoolExecutor(len(workers)) as threads:
                futures = [threads.submit(run, arm) for arm in due]
                try:
                    for future in futures:
                        future.result()
                except BaseException:  # the threads end when their processes do
                    stop.set()
                    for worker in workers:
                        worker.process.kill()
                    raise
        finally:
            for worker in workers:
                worker.close()

    def _order(self, arm: Arm) -> dict[str, Any]:
        steps = arm.budget // self.config.batch_size
        tasks = [
            {kind: {**options, "every": steps}} for task in self.training.evaluate for kind, options in task.items()
        ]
        config = dataclasses.replace(
            self.config,
            shards=str(self.pictures), subset=arm.subset, output=str(self.out / "training" / arm.key),
            samples=arm.budget, seed=arm.seed, evaluate=tasks, export=False, resume="latest", keep_checkpoints=1,
        )  # fmt: skip
        about = {"subset": Path(arm.subset).name, "samples": arm.samples, "budget": arm.budget, "seed": arm.seed}
        return {"config": dataclasses.asdict(config), "about": about}


class _Worker:
    """A process that trains the arms sent to it, one at a time. It ends when this process does."""

    def __init__(self) -> None:
        pipe = subprocess.PIPE
        self.process = start_child("pipeline.study.worker", stdin=pipe, stdout=pipe, text=True)

    def run(self, order: dict[str, Any]) -> dict[str, Any]:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        started = time.monotonic()
        log = f"{order['config']['output']}/log.txt"
        try:
            self.process.stdin.write(json.dumps(order) + "\n")
            self.process.stdin.flush()
            answer = json.loads(self.process.stdout.readline() or "{}")
        except OSError:
            answer = {}
        if "metrics" not in answer:
            status = self.process.wait() if not answer else None
            reason = answer.get("error", f"the process that trained it ended with status {status}")
            raise ArmError(f"{order['about']}: {reason}\n  see {log}")
        return {**order["about"], "metrics": answer["metrics"], "seconds": round(time.monotonic() - started, 1)}

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        for stream in (self.process.stdin, self.process.stdout):
            if stream:
                stream.close()


def check_metric(record: dict[str, Any], name: str) -> None:
    """Raises StudyError if the deciding metric is not among the results of a training."""
    numbers = [key for key, value in record["metrics"].items() if isinstance(value, int | float)]
    if name not in numbers:
        raise StudyError(f"train.metric: the tasks give no number {name!r}; they give {', '.join(numbers)}")
