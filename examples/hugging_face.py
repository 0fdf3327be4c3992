"""Reads the shards of a run with Hugging Face `datasets`: `python examples/hugging_face.py runs/demo`."""

from __future__ import annotations

import sys

from datasets import load_dataset


def main(run: str) -> int:
    """Streams every sample once; returns the number of samples."""
    data = load_dataset(f"{run}/shards", split="train", streaming=True)  # the README.md there states the types
    seen = 0
    for sample in data:
        seen += 1
        if seen <= 3:
            print(sample["__key__"], sample["jpg"].size, sample["txt"])
    print(f"{seen} samples")
    return seen


if __name__ == "__main__":
    main(sys.argv[1])
