"""Pictures and captions to feature vectors: the one place where evaluation runs a model."""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from itertools import islice
from typing import TypeVar

import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor
from torch.nn import functional as F

from trainer.config import ConfigError
from trainer.data import CorruptSampleError, ShardsError, decode
from trainer.evaluate.samples import EvaluationError, Sample
from trainer.model import DTYPES, Clip, ModelError, Preprocess, Tokenizer, encode_text, load
from trainer.terminal import Console
from trainer.train import find_device

TILE = 4096
"""Rows and columns of the largest matrix of similarities that is ever held."""
PLAIN_EVERY = 10.0
"""Seconds between lines of progress where there is no terminal."""

T = TypeVar("T")


@dataclass
class Encoder:
    """A trained model, and how many pictures or captions it takes at once."""

    model: Clip
    preprocess: Preprocess
    tokenizer: Tokenizer
    batch_size: int = 64

    @property
    def device(self) -> torch.device:
        return self.preprocess.device

    @torch.inference_mode()
    def texts(self, texts: list[str]) -> Tensor:
        """Unit vectors, float32 (texts, embed_dim), on the model's device. Raises EvaluationError if they are none."""
        vectors = []
        for batch in batched(texts, self.batch_size):
            found = encode_text(self.model, self.tokenizer(batch).to(self.device), normalize=True).float()
            vectors.append(sound(found, lambda row, batch=batch: f"the text {batch[row]!r}"))  # type: ignore[misc]
        return torch.cat(vectors)

    def images(
        self,
        samples: Iterable[Sample],
        total: int | None = None,
        *,
        penultimate: bool = False,
        corrupt: Callable[[Sample, str], None] | None = None,
    ) -> Iterator[tuple[list[Sample], Tensor]]:
        """Batches of samples with their features, float32 of shape (samples, dim), on the model's device.

        Features are unit vectors, or with `penultimate` those that the image tower ends in before their projection
        into the common space (what the paper's linear probes see, appendix A.3), unnormalised. A tower without a
        separate projection, such as a ResNet, gives its output. Pictures are decoded ahead, on every core.
        One that cannot be decoded raises EvaluationError, or goes to `corrupt` with the reason. Features that are not
        numbers always raise it: they tell of the model, not of the picture.
        """
        decoded = self._decoded(progress(samples, total, "pictures"))
        with unprojected(self.model) if penultimate else nullcontext():
            for batch in batched(decoded, self.batch_size):
                good = []
                for sample, pixels in batch:
                    if isinstance(pixels, Tensor):
                        good.append((sample, pixels))
                    elif corrupt:
                        corrupt(sample, str(pixels))
                    else:
                        raise EvaluationError(f"{sample.where}: {pixels}")
                if good:
                    kept = [sample for sample, _ in good]
                    features = self._encode([pixels for _, pixels in good], normalize=not penultimate)
                    yield kept, sound(features, lambda row, kept=kept: kept[row].where, unit=not penultimate)  # type: ignore[misc]

    def matrix(self, samples: Iterable[Sample], total: int | None, penultimate: bool = False) -> tuple[Tensor, Tensor]:
        """All features at once, float32 of shape (N, dim), and the labels, int64 of shape (N,); both on the CPU."""
        features: list[Tensor] = []
        labels: list[int] = []
        for batch, vectors in self.images(samples, total, penultimate=penultimate):
            features.append(vectors.cpu())
            labels.extend(sample.label for sample in batch)
        if not labels:
            raise EvaluationError("no pictures")
        return torch.cat(features), torch.tensor(labels)

    @torch.inference_mode()
    def _encode(self, pixels: list[Tensor], normalize: bool) -> Tensor:
        images = self.preprocess.normalize(torch.stack(pixels))
        features: Tensor = self.model.encode_image(images, normalize=normalize)
        return features.float()

    def _decoded(self, samples: Iterable[Sample]) -> Iterator[tuple[Sample, Tensor | CorruptSampleError]]:
        waiting: deque[tuple[Sample, Future[Tensor | CorruptSampleError]]] = deque()
        with ThreadPoolExecutor(os.cpu_count(), "decode") as pool:
            for sample in samples:
                waiting.append((sample, pool.submit(self._pixels, sample)))
                if len(waiting) > 2 * self.batch_size:
                    first, future = waiting.popleft()
                    yield first, future.result()
            while waiting:
                first, future = waiting.popleft()
                yield first, future.result()

    def _pixels(self, sample: Sample) -> Tensor | CorruptSampleError:
        if sample.problem:
            return CorruptSampleError(sample.problem)
        try:
            return self.preprocess.pixels(decode(sample.encoded))
        except ValueError as error:  # CorruptSampleError, or a shape that cannot be resized
            return CorruptSampleError(str(error))


def add_model_arguments(parser: argparse.ArgumentParser, required: bool = True) -> None:
    """The options that name a model; `open_encoder` reads them."""
    parser.add_argument("--model", required=required, help="a folder from trainer.export, or an open_clip name")
    parser.add_argument("--pretrained", help="tag or file of the weights, where --model is a name")
    parser.add_argument("--batch-size", type=int, default=64, help="images or captions at once (default 64)")
    parser.add_argument("--device", default="auto", help="cpu, cuda, ...; by default a GPU if there is one")
    parser.add_argument("--precision", choices=DTYPES, default="fp32", help="of the weights (default fp32)")


def open_encoder(args: argparse.Namespace) -> Encoder:
    """The model that the options name. Raises ConfigError or ModelError."""
    if args.batch_size < 1:
        raise ConfigError("--batch-size", [f"found {args.batch_size}, expected at least 1"])
    return Encoder(*load(args.model, args.pretrained, find_device(args.device), args.precision), args.batch_size)


def class_vectors(encoder: Encoder, names: list[str], templates: list[str]) -> Tensor:
    """A unit vector per class, shape (classes, embed_dim): the mean of its prompts' unit vectors, normalised again.

    Ensembling over the embeddings of prompts is that of Radford et al. 2021, section 3.1.4.
    Raises EvaluationError on a template without `{c}`.
    """
    for template in templates:
        if "{c}" not in template:
            raise EvaluationError(f"template {template!r}: expected {{c}} where the class name goes")
    vectors = []
    at_once = max(1, encoder.batch_size // len(templates))
    for chunk in batched(progress(names, len(names), "classes"), at_once):
        prompts = [template.replace("{c}", name) for name in chunk for template in templates]
        vectors.append(encoder.texts(prompts).view(len(chunk), len(templates), -1).mean(dim=1))
    return F.normalize(torch.cat(vectors), dim=-1)


def nearest(queries: Tensor, candidates: Tensor, k: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """The k candidates with the greatest inner product with each query: scores and numbers, (queries, k), on the CPU.

    Works in tiles: the matrix of all similarities never exists.
    """
    scores, numbers = [], []
    for some in queries.split(TILE):
        some = some.to(device)
        best = torch.empty(len(some), 0, device=device)
        which = torch.empty(len(some), 0, dtype=torch.int64, device=device)
        for start in range(0, len(candidates), TILE):
            tile = some @ candidates[start : start + TILE].to(device, some.dtype).T
            here, at = tile.topk(min(k, tile.shape[1]))
            best, order = torch.cat([best, here], dim=1).topk(min(k, best.shape[1] + here.shape[1]))
            which = torch.cat([which, at + start], dim=1).gather(1, order)
        scores.append(best.cpu())
        numbers.append(which.cpu())
    return torch.cat(scores), torch.cat(numbers)


def sound(vectors: Tensor, where: Callable[[int], str], unit: bool = True) -> Tensor:
    """The vectors (N, dim) themselves; EvaluationError, naming `where(row)`, if one of them is no result.

    Every feature that is judged passes here, whether a model has just made it or a file held it. Weights that overflow,
    in fp16 above all, give NaN and infinities; where the length of a vector alone overflows, normalisation gives zeros.
    So `unit` vectors must have a length of about 1, others must be finite.
    """
    good = (vectors.norm(dim=-1) - 1).abs() < 0.1 if unit else vectors.isfinite().all(dim=-1)
    if not bool(good.all()):
        row = int((~good).nonzero()[0])
        finite = bool(vectors[row].isfinite().all())
        found = (
            f"a vector of length {vectors[row].norm():.3g} instead of 1" if finite else "not numbers (NaN or infinite)"
        )
        raise EvaluationError(
            f"{where(row)}: the features are {found}: the weights of the model are damaged, or overflow in its"
            " precision; try --precision bf16 or fp32"
        )
    return vectors


def batched(items: Iterable[T], size: int) -> Iterator[list[T]]:
    iterator = iter(items)
    while batch := list(islice(iterator, size)):
        yield batch


def say(line: str) -> None:
    """A line on standard error, where progress goes; results alone go to standard output."""
    Console(stderr=True).print(line, highlight=False, markup=False, soft_wrap=True)


def progress(items: Iterable[T], total: int | None, what: str) -> Iterator[T]:
    """The items, counted on standard error: as a bar on a terminal, else as a line every ten seconds."""
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    told, count = time.monotonic(), 0
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task(what, total=total)
        for item in items:
            yield item
            count += 1
            bar.advance(task)
            if bar.disable and time.monotonic() - told > PLAIN_EVERY:
                told = time.monotonic()
                console.print(f"{count:,}{f' of {total:,}' if total else ''} {what}", highlight=False)


@contextmanager
def unprojected(model: Clip) -> Iterator[None]:
    """While this lasts, the image tower leaves out its last, linear projection, if it has one of its own."""
    projection = getattr(model.visual, "proj", None)
    if projection is not None:
        model.visual.proj = None
    try:
        yield
    finally:
        if projection is not None:
            model.visual.proj = projection


def exit_status(run: Callable[[], object]) -> int:
    """What a command ends with: 0; 2 for what the user gave it, 1 for what the machine did, each with a line."""
    try:
        run()
    except (ConfigError, EvaluationError, ModelError, ShardsError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0
