from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa

from pipeline.similarity import embeddings
from pipeline.step import Estimate, Fitted, Stage, check_column_name
from pipeline.text.hashing import hash64

if TYPE_CHECKING:
    from torch import Tensor

_ROWS = 256
"""Rows per matrix product. Fewer are padded: kernels are chosen by shape, and a score must not depend on the batch."""
_DECIMALS = 5
"""Sums differ in the seventh decimal between hardware; scores of a run spread over about a tenth."""


@dataclass(kw_only=True)
class NegClipLoss(Fitted, Stage):
    """Measures how well caption and picture match, relative to other pairs: negCLIPLoss (Wang et al., NeurIPS 2024).

    The CLIP score alone is also high for pairs that match everything, such as generic captions. negCLIPLoss subtracts a
    normaliser R. For the unit vectors v of a picture and t of its caption, and a batch of pairs (v_j, t_j) that
    contains them,

        score = v·t − R,  R = τ/2 · (log Σ_j exp(v·t_j / τ) + log Σ_j exp(v_j·t / τ)),

    which is −τ times the row's contrastive loss. R is averaged over `draws` batches. Higher is better; the score is at
    most 0, mostly above −0.2, and rounded to 5 decimals. The paper keeps the highest scores; use `threshold` for this.

    The paper divides the whole pool into batches, so each row is compared with other rows at random. Here all rows are
    compared with the same disjoint batches, sampled from the rows that reach this step: `draws` of them, or as many as
    the rows fill. The pair of a row outside a batch is added to it. With fewer rows than `batch_size`, all rows form
    one batch, and the score is exactly −τ times the loss. A row without both embeddings gets a null score and is in no
    batch.

    A row takes 4 · draws · batch_size · d operations: 0.3 billion by default with 512 dimensions, 7 ms on a CPU core.
    """

    image_vector: str = "image_embedding"
    """The column of picture embeddings: `clip_score` with `embeddings: true` adds both."""
    text_vector: str = "text_embedding"
    """The column of caption embeddings."""
    temperature: float = 0.01
    """τ, the temperature of the model that made the embeddings. Training of OpenAI's CLIP ended at its limit, 0.01."""
    batch_size: int = 32_768
    """Pairs per batch. The default is the training batch size of OpenAI's CLIP, as in the paper."""
    draws: int = 5
    """Maximum number of batches to average over. The paper also averages; the default is ours. Noise falls with the
    square root of this number, and cost grows in proportion to it."""
    column: str = "neg_clip_loss_score"
    """Name of the score column."""
    seed: int = 0
    """Seed of the sample."""

    resource = "gpu"

    def __post_init__(self) -> None:
        self.needs = ("uid", self.image_vector, self.text_vector)  # type: ignore[misc]
        self.adds = {self.column: pa.float32()}  # type: ignore[misc]

    def estimate(self, rows: float) -> Estimate:
        operations = 4 * self.draws * min(self.batch_size, rows) * 512
        return Estimate(1.0, 20e12 / max(operations, 1), "rate assumed: 20 TFLOP/s in fp32 on one GPU", stored=4)

    def check(self) -> Iterator[tuple[str, str]]:
        if not self.temperature > 0:
            yield "temperature", f"must be above 0, found {self.temperature}"
        for key, low, high in (("batch_size", 2, 1_000_000), ("draws", 1, 10_000)):
            if not low <= (value := getattr(self, key)) <= high:
                yield key, f"must be {low:,} to {high:,}, found {value:,}"
        yield from check_column_name(self.column, "neg_clip_loss_score")

    def check_columns(self, types: Mapping[str, pa.DataType]) -> Iterator[tuple[str, str]]:
        columns = {"image_vector": self.image_vector, "text_vector": self.text_vector}
        problems = list(embeddings.check_vectors(types, **columns))
        yield from problems
        image, text = types.get(self.image_vector), types.get(self.text_vector)
        if not problems and image is not None and text is not None and image.list_size != text.list_size:
            found = f"{self.image_vector} has {image.list_size} dimensions, and {self.text_vector} has {text.list_size}"
            yield "text_vector", f"{found}: they are from different models"

    def sample_rows(self, rows: int) -> int:
        wanted = self.draws * self.batch_size
        return wanted + 6 * int(wanted**0.5)  # enough unless the run itself has fewer rows

    def fit(self, sample: pa.Table, rows: int) -> pa.Table:
        """The pairs of all batches, with the hash of each uid, in an order drawn by the seed."""
        key = hash64(sample["uid"], seed=self.seed, purpose=self.name())
        order = np.argsort(key, kind="stable")
        whole = len(order) // self.batch_size
        order = order[: self.batch_size * min(self.draws, whole)] if whole else order
        vectors = sample.select([self.image_vector, self.text_vector]).take(pa.array(order))
        return vectors.append_column("key", pa.array(key[order])).combine_chunks()

    def use(self, fitted: pa.Table) -> None:
        self._fitted = fitted

    def setup(self) -> None:
        import torch

        from trainer.device import find_device

        device = find_device("auto")
        self._batches: list[tuple[Tensor, Tensor, Tensor, Tensor, dict[int, int]]] = []
        for low in range(0, len(self._fitted), self.batch_size):
            part = self._fitted.slice(low, self.batch_size)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", UserWarning)  # the mapped file is read-only, and is not written to
                image, text = (
                    torch.from_numpy(_flat(part[name])).reshape(len(part), -1).to(device)
                    for name in (self.image_vector, self.text_vector)
                )
            lengths = (torch.linalg.vector_norm(side.float(), dim=1).clamp(min=1e-12) for side in (image, text))
            places = {key: place for place, key in enumerate(part["key"].to_pylist())}
            self._batches.append((image, text, *lengths, places))
        self._device = device

    def process(self, batch: pa.Table) -> pa.Table:
        valid = embeddings.finite(batch[self.image_vector]) & embeddings.finite(batch[self.text_vector])
        rows = batch.filter(pa.array(valid))
        keys = hash64(rows["uid"], seed=self.seed, purpose=self.name()).tolist()
        image, text = (embeddings.unit(embeddings.matrix(rows[c])) for c in (self.image_vector, self.text_vector))
        score = np.zeros(len(batch))
        blocks = [slice(low, low + _ROWS) for low in range(0, len(rows), _ROWS)]
        score[valid] = np.concatenate([np.empty(0), *(self._scores(image[at], text[at], keys[at]) for at in blocks)])
        return batch.append_column(self.column, pa.array(score.round(_DECIMALS), pa.float32(), mask=~valid))

    def _scores(self, image: np.ndarray, text: np.ndarray, keys: list[int]) -> np.ndarray:
        """The scores of at most _ROWS pairs: float64 of shape (n,)."""
        import torch

        padded = np.zeros((2, _ROWS, image.shape[1]), np.float32)
        padded[0, : len(keys)], padded[1, : len(keys)] = image, text
        v, t = torch.from_numpy(padded).to(self._device)
        own = (v * t).sum(dim=1, keepdim=True)
        total = torch.zeros(_ROWS, dtype=torch.float64, device=self._device)
        with torch.inference_mode():
            for images, texts, image_lengths, text_lengths, places in self._batches:
                members = [(row, places[key]) for row, key in enumerate(keys) if key in places]
                for mine, others, lengths in ((v, texts, text_lengths), (t, images, image_lengths)):
                    # The row's own pair is added below, whether or not it is in the batch.
                    similar = mine @ others.float().T / lengths
                    for row, place in members:
                        similar[row, place] = -torch.inf
                    total += torch.logsumexp(torch.cat([similar, own], dim=1) / self.temperature, dim=1)
        normaliser = self.temperature / 2 * total / max(1, len(self._batches))
        return (own[:, 0] - normaliser)[: len(keys)].cpu().numpy()


def _flat(column: pa.ChunkedArray) -> np.ndarray:
    """The numbers in a column of vectors without nulls, in their own type and without a copy."""
    return np.asarray(column.combine_chunks().flatten().to_numpy(zero_copy_only=False))
