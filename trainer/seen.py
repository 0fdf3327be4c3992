"""Lists the steps at which a training run used given samples.

    python -m trainer.seen runs/b32 --uids uids.txt
    python -m trainer.seen runs/b32/checkpoints/step-00010000.pt --uids uids.txt --shards data/shards

The first argument is a checkpoint, or the output folder of a training, which stands for its newest checkpoint. The file
of uids has one per line, 32 hex digits; lines that begin with # are comments. Each uid gets a JSON line on standard
output: `uid`, the `samples` that have it (`SHARD.tar:KEY`) and the `steps`, up to the checkpoint, that used one of
these samples, counted from 1 as in metrics.jsonl.

The order of samples is a function of the seed, so only the checkpoint and the shards are needed. The shards must be
those that the model was trained on: run this before removing samples from them. Uids come from the tables beside the
tars, or from the JSON of each sample, and are read once; only the listed uids are held in memory. Samples that replaced
unreadable ones are found too: if the training had any, this takes another pass over all positions of the run, about 0.2
µs of CPU each.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from trainer.command import say
from trainer.errors import InputError
from trainer.terminal import entry_point, progress

BLOCK = 1 << 20
"""Positions of the run that are searched for replacements in one array."""
_UID = re.compile(r"[0-9a-f]{32}")


class SeenError(InputError):
    """A list of uids or a checkpoint cannot be used; the message names it."""


def read_uids(path: str) -> list[str]:
    """The distinct uids of a file, in its order. Raises SeenError."""
    try:
        lines = Path(path).read_bytes().decode("utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise SeenError(f"--uids: {path}: {error}") from None
    uids: dict[str, None] = {}
    for number, line in enumerate(lines, 1):
        text = line.strip().lower()
        if text and not text.startswith("#"):
            if not _UID.fullmatch(text):
                raise SeenError(f"--uids: {path}:{number}: found {line.strip()[:80]!r}, expected 32 hex digits")
            uids[text] = None
    if not uids:
        raise SeenError(f"--uids: {path}: lists no uid; expected 32 hex digits per line")
    return list(uids)


class Training:
    """A training run up to a checkpoint: finds the steps that used a sample. Raises InputError."""

    def __init__(self, path: Path, shards: str | None = None) -> None:
        from trainer import checkpoint
        from trainer.data import open_shards

        found, damaged = checkpoint.newest_whole(path) if path.is_dir() else (path, [])
        if found is None:
            raise SeenError(f"{path}: no checkpoint; expected a file, or the output folder of a training")
        state = checkpoint.load(found)
        for line in damaged:
            say(f"warning: {line}; the steps are those up to {found.name}")
        config: dict[str, Any] = state["config"]
        self.shards = open_shards(shards or config["shards"], config.get("subset"))
        if self.shards.fingerprint != state["data"]:
            raise SeenError(
                f"{found}: trained on other data than {self.shards.folder} has now; name a copy of it with --shards"
            )
        self.seed, self.batch_size = int(config["seed"]), int(config["batch_size"])
        self.steps, self.corrupt = int(state["step"]), int(state["corrupt"])
        self.per_epoch = len(self.shards) // self.batch_size
        size = state["preprocess_config"]["size"]
        self.size: int = size if isinstance(size, int) else size[0]
        self._known: dict[int, bool] = {}

    def find(self, uids: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """The numbers of the samples that have one of these uids, ascending, and the index of each sample's uid."""
        wanted = {uid: i for i, uid in enumerate(uids)}
        hits: list[tuple[int, int]] = []
        first = 0
        for tar_uids in progress(self.shards.uids(), None, "tars searched"):
            hits += [(first + i, wanted[uid]) for i, uid in enumerate(tar_uids) if uid in wanted]
            first += len(tar_uids)
        numbers, which = zip(*hits) if hits else ((), ())
        return np.array(numbers, np.int64), np.array(which, np.int64)

    def taken(self, numbers: np.ndarray) -> Iterator[tuple[int, int]]:
        """Yields each use of one of these samples: its index in `numbers`, and the step, from 1."""
        epochs = -(-self.steps // self.per_epoch)
        for epoch in progress(range(epochs), epochs, "epochs"):
            used = min(self.per_epoch, self.steps - epoch * self.per_epoch) * self.batch_size
            indices, positions = self.shards.positions(numbers, self.seed, epoch)
            uses = list(zip(indices.tolist(), positions.tolist()))
            if self.corrupt:
                uses = [use for use in uses if use[1] >= used or self._readable(int(numbers[use[0]]))]
                uses += self._replacements(epoch, used, indices, positions, numbers)
            for index, position in uses:
                if position < used:
                    yield index, epoch * self.per_epoch + position // self.batch_size + 1

    def _replacements(
        self, epoch: int, used: int, indices: np.ndarray, positions: np.ndarray, numbers: np.ndarray
    ) -> list[tuple[int, int]]:
        """Each use of one of these samples as a replacement: its index in `numbers`, and the position it replaced."""
        from trainer.data import MAX_REPLACEMENTS, replacements

        index_at = dict(zip(positions.tolist(), indices.tolist()))
        found = []
        for start in range(0, used, BLOCK):
            block = np.arange(start, min(start + BLOCK, used))
            for attempt in range(MAX_REPLACEMENTS):
                others = replacements(block, len(self.shards), self.seed, epoch, attempt)
                for at in block[np.isin(others, positions)].tolist():
                    if self._reached(epoch, at, attempt):
                        (other,) = replacements(np.array([at]), len(self.shards), self.seed, epoch, attempt).tolist()
                        if self._readable(int(numbers[index_at[other]])):
                            found.append((index_at[other], at))
        return found

    def _reached(self, epoch: int, position: int, attempt: int) -> bool:
        """Whether training made this attempt: the sample and all its earlier replacements are unreadable."""
        from trainer.data import replacements

        one = np.array([position])
        chain = [one, *(replacements(one, len(self.shards), self.seed, epoch, earlier) for earlier in range(attempt))]
        return not any(self._readable(int(self.shards.order(at, self.seed, epoch)[0])) for at in chain)

    def _readable(self, number: int) -> bool:
        from trainer.data import CorruptSampleError, decode, square_crop

        if number not in self._known:
            try:
                square_crop(decode(self.shards.read(number)[0], self.size), self.size, 0.0)
                self._known[number] = True
            except CorruptSampleError:
                self._known[number] = False
        return self._known[number]


def seen(checkpoint: str, uids: str, shards: str | None = None) -> Iterator[dict[str, Any]]:
    """Yields `uid`, `samples` and `steps` for each listed uid. Raises InputError."""
    wanted = read_uids(uids)
    training = Training(Path(checkpoint), shards)
    numbers, which = training.find(wanted)
    steps: list[list[int]] = [[] for _ in wanted]
    for index, step in training.taken(numbers):
        steps[int(which[index])].append(step)
    samples: list[list[str]] = [[] for _ in wanted]
    for number, index in zip(numbers.tolist(), which.tolist()):
        samples[index].append(training.shards.key(number))
    say(f"{len(np.unique(which)):,} of {len(wanted):,} uids are in the data; {training.steps:,} steps were trained")
    for i, uid in enumerate(wanted):
        yield {"uid": uid, "samples": samples[i], "steps": sorted(steps[i])}


@entry_point
def main(argv: Sequence[str] | None = None) -> None:
    """Runs the command."""
    parser = argparse.ArgumentParser(
        prog="python -m trainer.seen",
        description=__doc__,
        epilog="exit status: 0 done; 2 the list, the checkpoint or the shards cannot be used; 1 otherwise",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("checkpoint", help="a checkpoint, or the output folder of a training")
    parser.add_argument("--uids", required=True, metavar="FILE", help="file of uids, one per line")
    parser.add_argument("--shards", help="where the data is now, if it moved since the training")
    args = parser.parse_args(argv)
    for line in seen(args.checkpoint, args.uids, args.shards):
        print(json.dumps(line))


if __name__ == "__main__":
    sys.exit(main())
