"""Train/test overlap: near copies of evaluation images in the training data, and their effect on accuracy.

As in Radford et al. 2021, section 5: the test set (All) is split into the images that have a near copy in the training
data (Overlap) and those that have none (Clean). The result has the accuracy on each, All minus Clean as the gain from
contamination, the one-tailed binomial p-value of Overlap given Clean's accuracy, and the 99.5% Clopper-Pearson interval
of the accuracy on Overlap. DATA is in a layout of `zeroshot`, --train is a folder of shards.

With `--by phash`, two images are near copies if their 64-bit perceptual hashes differ in at most --max-hamming bits;
hashes are read from the shards' parquet files if they have them. With `--by embedding`, two images are near copies if
the cosine of the model's embeddings is at least --min-cosine; --train may then also be a folder that `trainer.search
embed` wrote. Good thresholds depend on the data: --pairs writes the pairs found, nearest first, for inspection.

    python -m trainer.evaluate overlap --model runs/demo/model --data FOLDER --train runs/demo --pairs pairs.jsonl
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from trainer import atomic
from trainer.command import open_encoder, say
from trainer.evaluate.classes import LabelledImages, open_labelled, read_classnames
from trainer.evaluate.zeroshot import add_class_arguments, classify
from trainer.hamming import Index
from trainer.pictures import decode
from trainer.samples import EvaluationError, Sample, batched, count_rows, read_columns, read_shards, read_vectors
from trainer.shards import CorruptSampleError, Shards
from trainer.terminal import progress

if TYPE_CHECKING:
    from torch import Tensor

    from trainer.features import Encoder

TASK = "overlap"
CONFIDENCE = 0.995
CHUNK = 65_536
"""Training images per comparison."""


class Match(NamedTuple):
    """The training image nearest to an evaluation image."""

    nearness: float
    """The cosine, or the negative Hamming distance: greater is nearer."""
    train: str
    """`SHARD.tar:KEY`"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_class_arguments(parser)
    parser.add_argument("--train", required=True, help="the training data: shards, or embeddings of them")
    parser.add_argument("--by", choices=("phash", "embedding"), default="phash", help="detector (default phash)")
    parser.add_argument("--max-hamming", type=int, default=4, help="bits that two hashes may differ in (default 4)")
    parser.add_argument("--min-cosine", type=float, default=0.95, help="least cosine of two embeddings (default 0.95)")
    parser.add_argument("--pairs", type=Path, help="JSONL file for the pairs: image, train, and distance or cosine")


def evaluate(args: argparse.Namespace) -> dict[str, Any]:
    """Accuracies (null without images) and counts of All, Clean and Overlap, and statistics of their difference."""
    if not -1 <= args.min_cosine <= 1:
        raise EvaluationError(f"--min-cosine: found {args.min_cosine}, expected -1 to 1")
    data = open_labelled(Path(args.data), read_classnames(args.classnames))
    encoder = open_encoder(args)
    best, labels, samples = classify(encoder, data, args.templates)
    right = (best[:, 0] == labels).numpy()
    matches = by_phash(data, args) if args.by == "phash" else by_embedding(encoder, data, args)
    if args.pairs:
        key, sign = ("distance", -1) if args.by == "phash" else ("cosine", 1)
        with atomic.replacing(args.pairs, parents=True) as file:
            for number in sorted(matches, key=lambda number: -matches[number].nearness):
                match = matches[number]
                pair = {"image": samples[number].where, "train": match.train, key: sign * match.nearness}
                file.write(json.dumps(pair).encode() + b"\n")
    found = np.zeros(len(samples), bool)
    found[list(matches)] = True
    return contamination(right, found)


def contamination(right: np.ndarray, overlap: np.ndarray) -> dict[str, Any]:
    """The analysis of section 5. `right` and `overlap` (bool) mark images classified correctly and with a near copy."""

    def share(hits: np.ndarray) -> float | None:
        return float(hits.mean()) if len(hits) else None

    everything, clean, dirty = share(right), share(right[~overlap]), share(right[overlap])
    metrics: dict[str, Any] = {
        "images": len(right),
        "overlap": int(overlap.sum()),
        "overlap_share": float(overlap.mean()),
        "acc1_all": everything,
        "acc1_clean": clean,
        "acc1_overlap": dirty,
        "acc1_all_minus_clean": None if clean is None or everything is None else everything - clean,
        "p_value": None,
        "acc1_overlap_interval": None,
    }
    if dirty is not None:
        from scipy.stats import binomtest  # takes a second to import

        hits, count = int(right[overlap].sum()), int(overlap.sum())
        interval = binomtest(hits, count).proportion_ci(CONFIDENCE, "exact")
        metrics["acc1_overlap_interval"] = [float(interval.low), float(interval.high)]
        if clean is not None:
            metrics["p_value"] = float(binomtest(hits, count, clean, "greater").pvalue)
    return metrics


def by_embedding(encoder: Encoder, data: LabelledImages, args: argparse.Namespace) -> dict[int, Match]:
    """The nearest training image, by cosine, of each evaluation image that has a near copy, keyed by image number."""
    import torch

    from trainer.features import nearest

    test, _ = encoder.matrix(data, data.count())
    best = torch.full((len(test),), -2.0)
    names = [""] * len(test)
    for vectors, keys in _train_vectors(encoder, args.train, test.shape[1]):
        scores, numbers = nearest(test, vectors, 1, encoder.device)
        nearer = scores[:, 0] > best
        best[nearer] = scores[nearer, 0]
        for row in nearer.nonzero()[:, 0].tolist():
            names[row] = keys[int(numbers[row, 0])]
    return {i: Match(cosine, names[i]) for i, cosine in enumerate(best.tolist()) if cosine >= args.min_cosine}


def _train_vectors(encoder: Encoder, train: str, dim: int) -> Iterator[tuple[Tensor, list[str]]]:
    """Yields unit vectors and names of the training images, thousands at a time."""
    import torch

    from trainer.features import sound

    parts = sorted((Path(train) / "img_emb").glob("img_emb_*.npy"))
    for part in parts:
        metadata = Path(train) / "metadata" / f"{part.stem.replace('img_emb', 'metadata')}.parquet"
        names = read_columns(metadata, "image_path")["image_path"].to_pylist()
        vectors = read_vectors(part)
        if vectors.shape != (len(names), dim):
            raise EvaluationError(
                f"{part}: embeddings of shape {vectors.shape}, expected {(len(names), dim)}, the rows of"
                f" {metadata.name} and the model's dimension; were they made by another model?"
            )
        found = torch.from_numpy(np.array(vectors, np.float32))
        yield sound(found, lambda row, part=part: f"{part}: row {row}"), names  # type: ignore[misc]
    if not parts:
        shards = Shards(train)
        batches = encoder.images(read_shards(shards), len(shards), corrupt=_name_corrupt)
        for chunk in batched(batches, max(1, CHUNK // encoder.batch_size)):
            names = [sample.where for batch, _ in chunk for sample in batch]
            yield torch.cat([vectors.cpu() for _, vectors in chunk]), names


def by_phash(data: LabelledImages, args: argparse.Namespace) -> dict[int, Match]:
    """As `by_embedding`, but by perceptual hash."""
    if not 0 <= args.max_hamming <= 16:
        raise EvaluationError(f"--max-hamming: found {args.max_hamming}, expected 0 to 16 of 64 bits")
    shards = Shards(args.train)
    test = np.concatenate([found for found, _ in _hashes(data, data.count(), strict=True)])
    index = Index(test, args.max_hamming)
    matches: dict[int, Match] = {}
    for hashes, numbers in _train_hashes(shards):
        place, distance = index.nearest_query(hashes)
        for i in np.flatnonzero(place >= 0).tolist():
            known = matches.get(i)
            if known is None or -distance[i] > known.nearness:
                matches[i] = Match(-int(distance[i]), shards.key(int(numbers[place[i]])))
    return matches


def _train_hashes(shards: Shards) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yields hashes and sample numbers of the training images, from the shards' parquet files if they have hashes."""
    tables = [Path(shards.folder) / f"{Path(shard.name).stem}.parquet" for shard in shards.shards]
    if not all(_has_hashes(table, shard.samples) for table, shard in zip(tables, shards.shards)):
        say(f"{shards.folder}: no parquet files with `phash`; hashing {len(shards):,} pictures")
        yield from _hashes(read_shards(shards), len(shards), strict=False)
        return
    start = 0
    for path in progress(tables, len(tables), "shards"):
        column = read_columns(path, "phash")["phash"].combine_chunks()
        numbers = np.flatnonzero(column.is_valid().to_numpy(zero_copy_only=False))
        if column.null_count:
            say(f"{path}: {column.null_count} samples without a hash; left out")
        yield column.drop_null().to_numpy().astype(np.uint64), start + numbers
        start += len(column)


def _has_hashes(table: Path, samples: int) -> bool:
    # Tables of other tools, such as img2dataset, also have rows for pictures that are not in the tar.
    if not table.is_file() or count_rows(table) != samples:
        return False
    schema = pq.read_schema(table)
    return "phash" in schema.names and pa.types.is_integer(schema.field("phash").type)


def _hashes(samples: Iterable[Sample], total: int | None, strict: bool) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yields perceptual hashes and numbers of pictures, in batches.

    Reports pictures that cannot be read and skips them, or raises EvaluationError if `strict`.
    """
    number = 0
    with ThreadPoolExecutor() as pool:
        for batch in batched(progress(samples, total, "hashes"), 1024):
            hashes, numbers = [], []
            for sample, found in zip(batch, pool.map(_phash, batch)):
                if isinstance(found, CorruptSampleError):
                    if strict:
                        raise EvaluationError(f"{sample.where}: {found}")
                    _name_corrupt(sample, str(found))
                else:
                    hashes.append(found)
                    numbers.append(number)
                number += 1
            yield np.array(hashes, np.uint64), np.array(numbers, np.int64)


def _phash(sample: Sample) -> int | CorruptSampleError:
    if sample.problem:
        return CorruptSampleError(sample.problem)
    import imagehash

    try:
        # The first bit of the hash's hex string is the most significant one, as in the shards' `phash`.
        return int(str(imagehash.phash(decode(sample.encoded))), 16)
    except CorruptSampleError as error:
        return error


def _name_corrupt(sample: Sample, why: str) -> None:
    say(f"{sample.where}: {why}; left out")
