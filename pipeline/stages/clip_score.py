from __future__ import annotations

import importlib.util
import json
import math
import os
import re
import sys
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal

import numpy as np
import pyarrow as pa
from PIL import Image

from pipeline.schema import holds_boxes
from pipeline.step import FILE, Estimate, Stage, check_column_name
from pipeline.text.hashing import file_digest
from trainer.spelling import did_you_mean

if TYPE_CHECKING:
    from torch import Tensor

SCORE_DECIMALS = 4
"""Floating-point sums differ in the seventh decimal between hardware and orders of summation. Four decimals are finer
than any meaningful threshold and coarse enough to hide nearly all such differences."""

# Longer than any context. The tokenizer's time grows with the square of a word's length.
_MAX_CHARS = 2000
# On a CPU, captions are grouped by padded length, since most are far shorter than the context. On a GPU, launching many
# small groups would cost more than the padding.
_TEXT_LENGTHS = (16, 32)
_PREFETCH = 3  # batches decoded ahead of the model

CONFIG_FILE, WEIGHTS_FILE = "open_clip_config.json", "open_clip_model.safetensors"


@dataclass(kw_only=True)
class ClipScore(Stage):
    """Measures how well caption and picture match: the cosine of their embeddings by a dual encoder such as CLIP.

    This is the basis of CLIPScore (Hessel et al., 2021), and the filter of LAION-400M (2021) and DataComp (2023). Use
    `threshold` to filter by the score.

    Adds `clip_score` (−1 to 1, mostly 0.1 to 0.4, rounded to 4 decimals; comparable only within one model). With
    `embeddings`, also adds the unit vectors `image_embedding` and `text_embedding` in fp16. Pictures that cannot be
    decoded are dropped (`decode_error`).

    Rows are batched across units. Libraries choose their kernels by shape, so all batches are padded to the same shape:
    a row's score then does not depend on the other rows in its batch (measured on ViT-B/32: bit-identical).
    """

    model: str = field(default="ViT-B-32", metadata=FILE)
    """An architecture of open_clip by name, `hf-hub:owner/name`, or a folder with `open_clip_config.json` and
    `open_clip_model.safetensors`."""
    pretrained: str | None = field(default=None, metadata=FILE)
    """Only with an architecture name: the tag of published weights (default `openai`) or a checkpoint file."""
    column: str = "clip_score"
    """Name of the score column. With a name other than the default, the embeddings are `COLUMN_image_embedding` and
    `COLUMN_text_embedding`, so that one recipe can use several models."""
    embeddings: bool = False
    """Also store the embeddings, which `semantic_dedup`, `linear_head` and other steps read."""
    mask: str | None = None
    """A column of boxes to hide before the picture is scored, such as `text_boxes` of `text_overlap` (T-MARS, Maini et
    al., 2024): lists of [x_min, y_min, x_max, y_max], 0 to 1. Each is filled with the mean colour around it."""
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """Type of the weights. `auto` is fp16 on a GPU (an eighth of bf16's error). On a CPU it is bf16, up to five times
    faster, if the CPU has instructions for it (AMX, AVX-512 BF16), else fp32. bf16 changes scores by a few thousandths
    (on the demo's pictures by 0.0005 on average and at most 0.0023). Set a type if different kinds of workers must give
    equal scores."""
    batch_size: int = 256
    """Pictures per batch; 32 to 64 is best on a CPU. Also affects results: another size changes the order of sums,
    which in bf16 changes scores by a few thousandths."""
    decode_threads: int | None = field(default=None, metadata={"speed": True})
    """Threads that decode and resize while the model runs. Default: all available cores."""

    needs: ClassVar[tuple[str, ...]] = ("image", "caption")
    version = 2
    expensive = True
    resource = "gpu"

    def __post_init__(self) -> None:
        self.needs = ("image", "caption", *([self.mask] if self.mask else []))  # type: ignore[misc]
        prefix = "" if self.column == "clip_score" else f"{self.column}_"
        self._vectors = (f"{prefix}image_embedding", f"{prefix}text_embedding") if self.embeddings else ()
        adds: dict[str, pa.DataType] = {self.column: pa.float32()}
        # check() reports an unknown dimension.
        adds |= dict.fromkeys(self._vectors, pa.list_(pa.float16(), self._dimension() or 1))
        self.adds = adds  # type: ignore[misc]

    def estimate(self, rows: float) -> Estimate:
        stored = 8 + 2 * len(self._vectors) * (self._dimension() or 1)
        return Estimate(1.0, 1500, "rate assumed: ViT-B/32 on one GPU, bound by decoding", stored=stored)

    def check(self) -> Iterator[tuple[str, str]]:
        """Checks without importing torch, which takes seconds. Tags are looked up as words in open_clip's list. Whether
        weights fit their configuration is checked when they are loaded."""
        yield from check_column_name(self.column, "clip_score_l14")
        for key, most in (("batch_size", 65_536), ("decode_threads", 1_024)):
            if (value := getattr(self, key)) is not None and not 1 <= value <= most:
                yield key, f"{value} must be 1 to {most:,}"
        folder = _folder(self.model)
        if folder is not None:
            if self.pretrained is not None:
                yield "pretrained", f"the folder {self.model} has its own weights; leave `pretrained` out"
            for name in (CONFIG_FILE, WEIGHTS_FILE):
                if not (folder / name).is_file():
                    yield "model", f"the folder {self.model} has no {name}"
        elif self.model.startswith("hf-hub:"):
            if self.embeddings:
                yield "embeddings", "requires a model of known dimension: a folder or an architecture name"
        elif _architecture(self.model) is None:
            near = _nearest(self.model, _architectures())
            yield "model", f"no folder or architecture named {self.model!r}{near}"
        elif not Path(self._weights() or "").is_file():
            known = set(re.findall(r"\w+", (_package("open_clip") / "pretrained.py").read_text(encoding="utf-8")))
            if self._weights() not in known:
                tag = f"{self.pretrained!r} is neither a file nor an open_clip tag"
                yield "pretrained", tag + _nearest(str(self.pretrained), known)
        if self.embeddings and folder is not None and self._dimension() is None:
            yield "model", f"{folder / CONFIG_FILE} is not an open_clip configuration: model_cfg.embed_dim is missing"

    def check_columns(self, types: Mapping[str, pa.DataType]) -> Iterator[tuple[str, str]]:
        boxes = types.get(self.mask or "")
        if boxes is not None and not holds_boxes(boxes):
            yield "mask", f"the column {self.mask!r} must hold lists of boxes, found type {boxes}"

    def fingerprint(self) -> object:
        folder = _folder(self.model)
        files = [folder / CONFIG_FILE, folder / WEIGHTS_FILE] if folder else [Path(self._weights() or "")]
        return [file_digest(file) for file in files if file.is_file()]

    def setup(self) -> None:
        from trainer.device import choose_precision, find_device
        from trainer.model import load

        device = find_device("auto")
        precision = choose_precision(self.precision, device, training=False)
        if precision.warning:
            print(f"warning: clip_score: {precision.warning}", file=sys.stderr)
        self._device = device.type
        self._model, self._preprocess, self._tokenize = load(self.model, self._weights(), device, precision.name)

    def stream(self, batches: Iterable[pa.Table]) -> Iterator[pa.Table]:
        """Decodes the next batches on threads while the model runs. Holds at most `_PREFETCH` + 1 batches."""
        pool = ThreadPoolExecutor(self.decode_threads or os.cpu_count(), "decode")
        waiting: deque[tuple[pa.Table, list[Future], Future]] = deque()
        try:
            for table in _rebatch(batches, self.batch_size):
                all_boxes = table[self.mask].to_pylist() if self.mask else [None] * len(table)
                images = (image.as_buffer() for image in table["image"])
                pictures = [pool.submit(self._pixels, image, boxes) for image, boxes in zip(images, all_boxes)]
                waiting.append((table, pictures, pool.submit(self._tokens, table["caption"])))
                if len(waiting) > _PREFETCH:
                    yield self._score(*waiting.popleft())
            while waiting:
                yield self._score(*waiting.popleft())
        finally:
            pool.shutdown(cancel_futures=True)

    def _pixels(self, image: pa.Buffer | None, boxes: list[list[float]] | None) -> Tensor | str:
        """uint8 of shape (3, side, side), or an error message."""
        from trainer.pictures import decode

        try:
            picture = decode(image.to_pybytes() if image else b"")
            return self._preprocess.pixels(masked(picture, boxes) if boxes else picture)
        except ValueError as error:
            return str(error)[:200]

    def _tokens(self, captions: pa.ChunkedArray) -> Tensor:
        # Via bytes, since a column may hold invalid UTF-8.
        texts = [(caption or b"").decode("utf-8", "replace") for caption in captions.cast(pa.binary()).to_pylist()]
        return self._tokenize([text[:_MAX_CHARS] for text in texts])

    def _score(self, table: pa.Table, pictures: list[Future], tokens: Future) -> pa.Table:
        import torch

        decoded = [picture.result() for picture in pictures]
        problems = [picture if isinstance(picture, str) else None for picture in decoded]
        side = self._preprocess.size
        pixels = torch.zeros(self.batch_size, 3, side, side, dtype=torch.uint8)
        for i, picture in enumerate(decoded):
            if not isinstance(picture, str):
                pixels[i] = picture
        with torch.inference_mode():
            image = _unit(self._model.encode_image(self._preprocess.normalize(pixels)))[: len(table)]
            text = self._encode_text(tokens.result())
            score = (image * text).sum(dim=-1).clamp(-1, 1).double().cpu().numpy()
        if not np.isfinite(score).all():
            raise FloatingPointError(f"{self.model} overflows in this precision; set `precision: bf16` or `fp32`")
        broken = np.array([problem is not None for problem in problems], dtype=bool)
        columns = {self.column: pa.array(score.round(SCORE_DECIMALS), pa.float32(), mask=broken)}
        for name, vectors in zip(self._vectors, (image, text)):
            flat = pa.array(vectors.half().cpu().numpy().reshape(-1))
            columns[name] = pa.FixedSizeListArray.from_arrays(flat, vectors.shape[1])
        columns["drop_reason"] = pa.array(["decode_error" if problem else None for problem in problems], pa.string())
        columns["drop_detail"] = pa.array(problems, pa.string())
        for name, values in columns.items():
            table = table.append_column(name, values)
        return table

    def _encode_text(self, tokens: Tensor) -> Tensor:
        """Unit vectors of shape (captions, dimension) for token ids of shape (captions, context)."""
        import torch

        from trainer.model import encode_text

        context = tokens.shape[1]
        causal = getattr(self._model, "text_pool_type", None) == "argmax"
        lengths = tokens.argmax(dim=-1) + 1 if causal else torch.full((len(tokens),), context)
        on_gpu = self._device == "cuda"
        bounds = [0, *(n for n in _TEXT_LENGTHS if n < context and not on_gpu), context]
        size = self.batch_size if on_gpu else max(self.batch_size // 4, 1)
        index, parts = [], []
        for shortest, longest in pairwise(bounds):
            for rows in torch.nonzero((lengths > shortest) & (lengths <= longest)).flatten().split(size):
                # The extra row ends exactly at `longest`, so `encode_text` trims every group to that length.
                group = torch.zeros(size + 1, context, dtype=tokens.dtype)
                group[: len(rows)] = tokens[rows]
                group[-1, longest - 1] = tokens.max()
                index.append(rows)
                parts.append(_unit(encode_text(self._model, group.to(self._device)))[: len(rows)])
        return torch.cat(parts)[torch.argsort(torch.cat(index))]

    def _weights(self) -> str | None:
        by_name = _folder(self.model) is None and not self.model.startswith("hf-hub:")
        return self.pretrained or ("openai" if by_name else None)

    def _dimension(self) -> int | None:
        folder = _folder(self.model)
        path = folder / CONFIG_FILE if folder else _architecture(self.model)
        try:
            config = json.loads(path.read_text(encoding="utf-8")) if path else {}
            return int(config.get("model_cfg", config)["embed_dim"])
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return None


def masked(picture: Image.Image, boxes: list[list[float]]) -> Image.Image:
    """Returns the picture in RGB, with each box filled with the mean colour of the pixels around it.

    A box is [x_min, y_min, x_max, y_max], 0 to 1. Raises ValueError for a box that is not four numbers.
    """
    pixels = np.array(picture.convert("RGB"))
    before, (height, width) = pixels.copy(), pixels.shape[:2]
    for box in boxes:
        if box is None or len(box) != 4 or None in box or not np.isfinite(box).all():
            raise ValueError(f"expected boxes of four numbers to mask, found {box}")
        x_min, y_min, x_max, y_max = box
        left, top = max(0, math.floor(x_min * width)), max(0, math.floor(y_min * height))
        right, bottom = min(width, math.ceil(x_max * width)), min(height, math.ceil(y_max * height))
        if left >= right or top >= bottom:
            continue
        ring = np.s_[max(0, top - 1) : bottom + 1, max(0, left - 1) : right + 1]
        inside = before[top:bottom, left:right].reshape(-1, 3)
        around = before[ring].reshape(-1, 3)
        n = len(around) - len(inside)
        colour = (around.sum(axis=0) - inside.sum(axis=0)) / n if n else inside.mean(axis=0)
        pixels[top:bottom, left:right] = np.rint(colour)
    return Image.fromarray(pixels)


def _rebatch(batches: Iterable[pa.Table], size: int) -> Iterator[pa.Table]:
    """The same rows in the same order, in tables of `size` rows. The last may be shorter."""
    held: list[pa.Table] = []
    rows = 0
    for batch in batches:
        held.append(batch)
        rows += len(batch)
        if rows >= size:
            table = pa.concat_tables(held)
            whole = rows - rows % size
            for start in range(0, whole, size):
                yield table.slice(start, size)
            held, rows = [table.slice(whole)], rows - whole
    if rows:
        yield pa.concat_tables(held)


def _unit(features: Tensor) -> Tensor:
    """Normalises in fp32, whatever the model's precision."""
    import torch

    return torch.nn.functional.normalize(features.float(), dim=-1)


def _folder(model: str) -> Path | None:
    return Path(model) if Path(model).is_dir() else None


def _architectures() -> dict[str, Path]:
    """The model configurations of open_clip and the trainer, by name. Finds them without importing either package."""
    folders = (_package("open_clip") / "model_configs", _package("trainer") / "configs")
    return {path.stem: path for folder in folders for path in folder.glob("*.json")}


def _architecture(model: str) -> Path | None:
    return _architectures().get(model.replace("/", "-"))


def _package(name: str) -> Path:
    spec = importlib.util.find_spec(name)
    assert spec is not None, name
    assert spec.origin is not None, name
    return Path(spec.origin).parent


def _nearest(word: str, known: Iterable[str]) -> str:
    return did_you_mean(word.replace("/", "-"), known, cutoff=0.5)
