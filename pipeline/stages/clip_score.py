from __future__ import annotations

import hashlib
import importlib.util
import io
import json
import os
import re
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pyarrow as pa
from PIL import Image

from pipeline.step import Estimate, Stage
from trainer.spelling import did_you_mean

if TYPE_CHECKING:
    from torch import Tensor

SCORE_DECIMALS = 4
"""Floating-point sums come out a few units of the seventh decimal apart on other hardware or in another order. Four
decimals are far finer than any threshold is meaningful, and coarse enough that this hardly ever shows."""

# What `download` writes, and what other tools' shards hold.
_FORMATS = ("JPEG", "PNG", "WEBP", "GIF")
_MAX_PIXELS = 89_478_485  # where Pillow begins to suspect a decompression bomb
# Farther than a context reaches; and the tokenizer's time grows with the square of a word's length.
_MAX_CHARS = 2000
# On a CPU, captions run in groups of equal padded length, since most are far shorter than the context. On a GPU the
# launches of many small groups would cost more than the padding does.
_TEXT_LENGTHS = (16, 32)
_PREFETCH = 3  # batches being decoded while one is in the model

CONFIG_FILE, WEIGHTS_FILE = "open_clip_config.json", "open_clip_model.safetensors"


@dataclass(kw_only=True)
class ClipScore(Stage):
    """Measures how well caption and picture agree: the cosine of their embeddings in a dual encoder (CLIPScore's basis,
    Hessel et al., 2021; the filter of LAION-400M, 2021, and DataComp, 2023).

    Adds `clip_score` (−1 to 1, mostly 0.1 to 0.4, rounded to 4 decimals; comparable only within one model), and with
    `embeddings` the unit vectors `image_embedding` and `text_embedding` in fp16. A picture that cannot be decoded is
    dropped (`decode_error`).

    Rows are batched across units. Every batch that reaches the model has the same shape, padded where rows are lacking,
    so that a row's score does not depend on the rows it happens to share a batch with: kernels are chosen by shape, and
    within one shape every row takes the same path (measured on ViT-B/32: bit for bit).
    """

    model: str = "ViT-B-32"
    """An architecture of open_clip by name, `hf-hub:owner/name`, or a folder with `open_clip_config.json` and
    `open_clip_model.safetensors`."""
    pretrained: str | None = None
    """For a name: the tag of its published weights (`openai` if left out) or a checkpoint file."""
    column: str = "clip_score"
    """Name of the score; with another than the default, the embeddings are called `COLUMN_image_embedding` and so on,
    so that several models can stand side by side."""
    embeddings: bool = False
    """Whether to store the embeddings too: what `semantic_dedup` and further scores work on."""
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """Type of the weights. `auto` is fp16 on a GPU, whose error is an eighth of bf16's, and fp32 on a CPU, where
    `bf16` is up to five times faster if the CPU has the instructions for it."""
    batch_size: int = 256
    """Pictures in a batch; 32 to 64 is best on a CPU. Not only a matter of speed: another size is another order of
    sums, which in bf16 moves scores by some thousandths."""
    decode_threads: int | None = field(default=None, metadata={"speed": True})
    """Threads that decode and resize while the model runs; all available cores if left out."""

    needs = ("image", "caption")
    commits = True
    resource = "gpu"

    def __post_init__(self) -> None:
        prefix = "" if self.column == "clip_score" else f"{self.column}_"
        self._vectors = (f"{prefix}image_embedding", f"{prefix}text_embedding") if self.embeddings else ()
        adds: dict[str, pa.DataType] = {self.column: pa.float32()}
        # Without a dimension there is a problem that check() reports.
        adds |= dict.fromkeys(self._vectors, pa.list_(pa.float16(), self._dimension() or 1))
        self.adds = adds  # type: ignore[misc]

    def estimate(self, rows: float) -> Estimate:
        return Estimate(1.0, 1500, "rate assumed: ViT-B/32 on one GPU, bound by decoding", stored=8)

    def check(self) -> Iterator[tuple[str, str]]:
        """Without importing torch, which takes seconds: tags are looked up only as words of open_clip's own list, and
        whether weights fit their configuration shows when they are loaded."""
        if not self.column.isidentifier():
            yield "column", f"{self.column!r} is no name for a column; expected one such as 'clip_score_l14'"
        for key in ("batch_size", "decode_threads"):
            if (value := getattr(self, key)) is not None and value < 1:
                yield key, f"{value} is less than one"
        folder = _folder(self.model)
        if folder is not None:
            if self.pretrained is not None:
                yield "pretrained", f"{self.model} is a folder with weights of its own; leave `pretrained` out"
            for name in (CONFIG_FILE, WEIGHTS_FILE):
                if not (folder / name).is_file():
                    yield "model", f"the folder {self.model} has no {name}"
        elif self.model.startswith("hf-hub:"):
            if self.embeddings:
                yield (
                    "embeddings",
                    "need a model of known dimension: a folder, or the name of an architecture",
                )
        elif _architecture(self.model) is None:
            near = _nearest(self.model, _architectures())
            yield "model", f"no folder {self.model!r} and no architecture of that name{near}"
        elif not Path(self._weights() or "").is_file():
            known = set(re.findall(r"\w+", (_package("open_clip") / "pretrained.py").read_text(encoding="utf-8")))
            if self._weights() not in known:
                tag = f"{self.pretrained!r} is neither a file nor a tag of open_clip's"
                yield "pretrained", tag + _nearest(str(self.pretrained), known)
        if self.embeddings and folder is not None and self._dimension() is None:
            yield "model", f"{folder / CONFIG_FILE} is no configuration of open_clip's: it has no model_cfg.embed_dim"

    def fingerprint(self) -> object:
        folder = _folder(self.model)
        files = [folder / CONFIG_FILE, folder / WEIGHTS_FILE] if folder else [Path(self._weights() or "")]
        return [_sha256(file) for file in files if file.is_file()]

    def setup(self) -> None:
        import torch

        from trainer.model import load

        self._device = "cuda" if torch.cuda.is_available() else "cpu"
        auto = "fp16" if self._device == "cuda" else "fp32"
        precision = auto if self.precision == "auto" else self.precision
        self._model, self._preprocess, self._tokenize = load(self.model, self._weights(), self._device, precision)

    def stream(self, batches: Iterable[pa.Table]) -> Iterator[pa.Table]:
        """Decodes ahead on threads while the model runs; at most `_PREFETCH` + 1 batches are held."""
        pool = ThreadPoolExecutor(self.decode_threads or os.cpu_count(), "decode")
        waiting: deque[tuple[pa.Table, list[Future], Future]] = deque()
        try:
            for table in _rebatch(batches, self.batch_size):
                pictures = [pool.submit(self._pixels, image.as_buffer()) for image in table["image"]]
                waiting.append((table, pictures, pool.submit(self._tokens, table["caption"])))
                if len(waiting) > _PREFETCH:
                    yield self._score(*waiting.popleft())
            while waiting:
                yield self._score(*waiting.popleft())
        finally:
            pool.shutdown(cancel_futures=True)

    def _pixels(self, image: pa.Buffer | None) -> Tensor | str:
        """uint8 (3, side, side), or what is wrong with the picture."""
        try:
            with Image.open(io.BytesIO(image or b""), formats=_FORMATS) as picture:
                if picture.width * picture.height > _MAX_PIXELS:
                    return f"{picture.width}x{picture.height} is too large"
                return self._preprocess.pixels(picture)
        except Exception as error:  # Pillow answers hostile bytes with almost any exception
            return f"{type(error).__name__}: {error}"[:200]

    def _tokens(self, captions: pa.ChunkedArray) -> Tensor:
        # Through bytes, since a column may hold invalid UTF-8.
        texts = [(caption or b"").decode("utf-8", "replace") for caption in captions.cast(pa.binary()).to_pylist()]
        return self._tokenize([text[:_MAX_CHARS] for text in texts])

    def _score(self, table: pa.Table, pictures: list[Future], tokens: Future) -> pa.Table:
        import torch

        found = [picture.result() for picture in pictures]
        problems = [picture if isinstance(picture, str) else None for picture in found]
        side = self._preprocess.size
        pixels = torch.zeros(self.batch_size, 3, side, side, dtype=torch.uint8)
        for i, picture in enumerate(found):
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
        """Unit vectors (captions, dimension) of token ids (captions, context)."""
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
                # One row more than there are captions: it ends exactly at `longest`, so that this is the length that
                # `encode_text` trims the group to.
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


def _rebatch(batches: Iterable[pa.Table], size: int) -> Iterator[pa.Table]:
    """The same rows in the same order in tables of `size` rows; the last may be shorter."""
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
    """In fp32, whatever the model computes in."""
    import torch

    return torch.nn.functional.normalize(features.float(), dim=-1)


def _folder(model: str) -> Path | None:
    return Path(model) if Path(model).is_dir() else None


def _architectures() -> dict[str, Path]:
    """The configurations of open_clip and of the trainer by name, found without importing either."""
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


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        digest: Any = hashlib.sha256()
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
