"""Encodes pictures and captions as feature vectors; evaluation runs models only here."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from trainer.model import Clip, Preprocess, Tokenizer, encode_text
from trainer.pictures import decode
from trainer.samples import EvaluationError, Sample, batched
from trainer.shards import CorruptSampleError
from trainer.terminal import progress

TILE = 4096
"""Rows and columns of a tile of the similarity matrix."""


@dataclass
class Encoder:
    """A trained model, and the number of pictures or captions that it encodes per batch."""

    model: Clip
    preprocess: Preprocess
    tokenizer: Tokenizer
    batch_size: int = 64

    @property
    def device(self) -> torch.device:
        return self.preprocess.device

    @torch.inference_mode()
    def texts(self, texts: list[str]) -> Tensor:
        """Unit vectors, float32 (texts, embed_dim), on the model's device.

        Raises EvaluationError if a vector is not finite.
        """
        vectors = []
        for batch in batched(texts, self.batch_size):
            features = encode_text(self.model, self.tokenizer(batch).to(self.device), normalize=True).float()
            vectors.append(sound(features, lambda row, batch=batch: f"the text {batch[row]!r}"))  # type: ignore[misc]
        return torch.cat(vectors)

    def classes(self, names: list[str], templates: list[str]) -> Tensor:
        """A unit vector per class, shape (classes, embed_dim): the mean of its prompts' unit vectors, normalised again.

        This is prompt ensembling in embedding space (Radford et al. 2021, section 3.1.4).
        Raises EvaluationError on a template without `{c}`.
        """
        for template in templates:
            if "{c}" not in template:
                raise EvaluationError(f"template {template!r}: expected {{c}} where the class name goes")
        vectors = []
        classes_per_batch = max(1, self.batch_size // len(templates))
        for chunk in batched(progress(names, len(names), "classes"), classes_per_batch):
            prompts = [template.replace("{c}", name) for name in chunk for template in templates]
            vectors.append(self.texts(prompts).view(len(chunk), len(templates), -1).mean(dim=1))
        return F.normalize(torch.cat(vectors), dim=-1)

    def images(
        self,
        samples: Iterable[Sample],
        total: int | None = None,
        *,
        penultimate: bool = False,
        corrupt: Callable[[Sample, str], None] | None = None,
    ) -> Iterator[tuple[list[Sample], Tensor]]:
        """Batches of samples with their features, float32 of shape (samples, dim), on the model's device.

        Features are unit vectors, or with `penultimate` the unnormalised output of the image tower before its
        projection into the common space (as in the paper's linear probes, appendix A.3). A tower without a separate
        projection, such as a ResNet, gives its output. Pictures are decoded in advance, on every core. A picture that
        cannot be decoded is passed to `corrupt` with the reason; without `corrupt`, it raises EvaluationError. Features
        that are not finite always raise EvaluationError, because the model is at fault, not the picture.
        """
        decoded = self._decoded(progress(samples, total, "pictures"))
        with unprojected(self.model) if penultimate else nullcontext():
            for batch in batched(decoded, self.batch_size):
                kept, images = [], []
                for sample, pixels in batch:
                    if isinstance(pixels, Tensor):
                        kept.append(sample)
                        images.append(pixels)
                    elif corrupt:
                        corrupt(sample, str(pixels))
                    else:
                        raise EvaluationError(f"{sample.where}: {pixels}")
                if kept:
                    features = self._encode(images, normalize=not penultimate)
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
            for first, future in waiting:
                yield first, future.result()

    def _pixels(self, sample: Sample) -> Tensor | CorruptSampleError:
        if sample.problem:
            return CorruptSampleError(sample.problem)
        try:
            return self.preprocess.pixels(decode(sample.encoded))
        except ValueError as error:  # CorruptSampleError, or a shape that cannot be resized
            return CorruptSampleError(str(error))


def nearest(queries: Tensor, candidates: Tensor, k: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """The k candidates with the greatest inner product with each query: scores and numbers, (queries, k), on the CPU.

    Works in tiles, to avoid holding the whole similarity matrix in memory.
    """
    scores, numbers = [], []
    for rows in queries.split(TILE):
        rows = rows.to(device)
        best_scores = torch.empty(len(rows), 0, device=device)
        best = torch.empty(len(rows), 0, dtype=torch.int64, device=device)
        for start in range(0, len(candidates), TILE):
            tile = rows @ candidates[start : start + TILE].to(device, rows.dtype).T
            tile_scores, columns = tile.topk(min(k, tile.shape[1]))
            merged = torch.cat([best_scores, tile_scores], dim=1)
            best_scores, order = merged.topk(min(k, merged.shape[1]))
            best = torch.cat([best, columns + start], dim=1).gather(1, order)
        scores.append(best_scores.cpu())
        numbers.append(best.cpu())
    return torch.cat(scores), torch.cat(numbers)


def sound(vectors: Tensor, where: Callable[[int], str], unit: bool = True) -> Tensor:
    """Returns the vectors (N, dim) unchanged. Raises EvaluationError, naming `where(row)`, if a vector is invalid.

    All features pass through here, whether computed or read from a file. Weights that overflow, mostly in fp16, give
    NaN and infinities. If only the norm of a vector overflows, normalisation gives zeros. Therefore `unit` vectors must
    have a norm of about 1, and others must be finite.
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


@contextmanager
def unprojected(model: Clip) -> Iterator[None]:
    """A context in which the image tower skips its final linear projection, if it has one."""
    projection = getattr(model.visual, "proj", None)
    if projection is not None:
        model.visual.proj = None
    try:
        yield
    finally:
        if projection is not None:
            model.visual.proj = projection
