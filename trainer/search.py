"""Semantic search and caption retrieval over a dataset, by text or by image.

    python -m trainer.search embed SHARDS --model runs/demo/model --out DIR     embeddings only
    python -m trainer.search index SHARDS --model runs/demo/model --out DIR     embeddings, and indexes over them
    python -m trainer.search index DIR                                          indexes over existing embeddings
    python -m trainer.search query DIR --text "a red circle" -k 5               the images nearest to a text
    python -m trainer.search query DIR --image photo.jpg --captions             the captions nearest to an image

Embeddings are in clip-retrieval's layout: `img_emb/img_emb_0.npy` and `text_emb/text_emb_0.npy` (unit vectors, fp16),
`metadata/metadata_0.parquet` with `image_path` and `caption`, row by row. Parts are written atomically, and `embed`
resumes after the last one. The indexes are faiss's, `image.index` and `text.index`, in fp16, and a search reads them
from disk. Up to a million vectors a search is exhaustive; beyond that, vectors are in inverted lists (`--lists`), of
which a query reads `--probes`. Needs faiss: pip install 'winnow-clip[search]'.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from trainer import atomic
from trainer.command import add_model_arguments, open_encoder, say
from trainer.config import ConfigError
from trainer.samples import (
    EvaluationError,
    Sample,
    count_rows,
    read_columns,
    read_file,
    read_shards,
    read_vectors,
)
from trainer.shards import Shards, ShardsError
from trainer.terminal import entry_point, progress

if TYPE_CHECKING:
    from trainer.features import Encoder

SETTINGS = "search.json"
"""File that names the model and the data of the embeddings; written before them."""
EXHAUSTIVE = 1_000_000
"""Up to this many vectors, a query is compared with all: the result is exact and takes a fraction of a second."""
TRAINING = 64
"""Vectors per inverted list to fit the centres of the lists to (faiss warns below 39)."""


def embed(args: argparse.Namespace) -> None:
    """Embeds the samples of shards, part by part."""
    shards, out = Shards(args.source), Path(args.out)
    settings = {
        "model": args.model,
        "pretrained": args.pretrained,
        "precision": args.precision,
        "samples": len(shards),
        "part": args.part,
        "shards": str(args.source),
        "fingerprint": shards.fingerprint,
    }
    if (out / SETTINGS).is_file():
        before = _settings(out)
        if changed := [key for key in settings if key != "shards" and settings[key] != before.get(key)]:
            lines = [f"{key}: {before.get(key)} there, {settings[key]} now" for key in changed]
            raise ConfigError(str(out), [*lines, "holds other embeddings; give another --out"])
    parts = math.ceil(len(shards) / args.part)
    digits = len(str(parts))  # padded as by clip-retrieval
    encoder = open_encoder(args)
    with atomic.replacing(out / SETTINGS, parents=True) as file:
        file.write(json.dumps(settings, indent=2).encode() + b"\n")
    for part in range(parts):
        path = out / "metadata" / f"metadata_{part:0{digits}d}.parquet"
        if not path.is_file():
            say(f"part {part + 1} of {parts}")
            start, stop = part * args.part, min(len(shards), (part + 1) * args.part)
            _embed_part(encoder, shards, start, stop, out, path.stem.removeprefix("metadata_"))


def _embed_part(encoder: Encoder, shards: Shards, start: int, stop: int, out: Path, name: str) -> None:
    images, texts, keys, captions = [], [], [], []

    def corrupt(sample: Sample, why: str) -> None:
        say(f"{sample.where}: {why}; left out")

    for batch, vectors in encoder.images(read_shards(shards, start, stop), stop - start, corrupt=corrupt):
        images.append(vectors.cpu().half().numpy())
        texts.append(encoder.texts([sample.captions[0] for sample in batch]).cpu().half().numpy())
        keys += [sample.where for sample in batch]
        captions += [sample.captions[0] for sample in batch]
    if not keys:
        raise ShardsError(f"{shards.folder}: none of the samples {start} to {stop - 1} is readable")
    for kind, blocks in (("img_emb", images), ("text_emb", texts)):
        with atomic.replacing(out / kind / f"{kind}_{name}.npy", parents=True) as file:
            np.save(file, np.concatenate(blocks))
    # Written last: if it exists, the part is complete.
    table = pa.table({"image_path": keys, "caption": captions})
    with atomic.replacing(out / "metadata" / f"metadata_{name}.parquet", parents=True) as file:
        pq.write_table(table, file)


def index(args: argparse.Namespace) -> None:
    """Builds the indexes over the embeddings of a folder; embeds the samples first if given shards."""
    _faiss()
    folder = Path(args.source)
    if "://" not in args.source and not set(args.source) & set("{*") and not folder.exists():
        raise EvaluationError(f"{folder}: no such folder")
    if not (folder / "img_emb").is_dir():
        if not args.model or not args.out:
            raise ConfigError(args.source, ["has no img_emb/, so --model and --out are needed to embed it"])
        embed(args)
        folder = Path(args.out)
    for name, kind in (("image", "img_emb"), ("text", "text_emb")):
        files = _parts(folder, kind)
        if name == "text" and not files:
            continue
        path = folder / f"{name}.index"
        build(files, path, args.lists)
        say(str(path))


def build(files: list[Path], out: Path, lists: int | None) -> None:
    """Builds a faiss index by inner product over .npy files of vectors; rows are numbered through the files in order.

    Raises EvaluationError if there are no vectors, or fewer than `lists`.
    """
    import torch

    from trainer.features import sound

    faiss = _faiss()
    arrays = [read_vectors(file) for file in files]
    total = sum(map(len, arrays))
    for file, array in zip(files, arrays):
        if array.shape[1] != arrays[0].shape[1]:
            raise EvaluationError(f"{file}: {array.shape[1]} dimensions, but {files[0].name} has {arrays[0].shape[1]}")
    if not total:
        raise EvaluationError(f"{out.parent}: no embeddings; `trainer.search embed` makes them")
    if lists is None:
        lists = 0 if total <= EXHAUSTIVE else int(4 * math.sqrt(total))
    if lists > total:
        raise EvaluationError(f"--lists: found {lists}, but there are only {total} vectors")
    # The embeddings are stored in fp16, so an index in fp16 loses nothing.
    kind = f"IVF{lists},SQfp16" if lists else "SQfp16"
    built = faiss.index_factory(arrays[0].shape[1], kind, faiss.METRIC_INNER_PRODUCT)
    if lists:
        # Samples may be stored in any order, so take some from every part.
        share = max(1, total // (lists * TRAINING))
        built.train(np.concatenate([array[::share] for array in arrays]).astype(np.float32))
    else:
        built.train(np.asarray(arrays[0][:1], np.float32))
    for file, array in progress(list(zip(files, arrays)), len(arrays), "parts"):
        for start in range(0, len(array), 65_536):
            block = np.array(array[start : start + 65_536], np.float32)
            sound(torch.from_numpy(block), lambda row, file=file, start=start: f"{file}: row {start + row}")  # type: ignore[misc]
            built.add(block)
    with atomic.replacing(out) as written:
        faiss.write_index(built, faiss.PyCallbackIOWriter(written.write))


class Searcher:
    """An index folder, opened for queries."""

    def __init__(self, folder: str | Path, captions: bool = False, probes: int = 64) -> None:
        faiss = _faiss()
        path = Path(folder) / ("text.index" if captions else "image.index")
        if not path.is_file():
            raise EvaluationError(f"{path}: missing; `python -m trainer.search index {folder}` builds it")
        try:
            self.index = faiss.read_index(str(path), faiss.IO_FLAG_MMAP | faiss.IO_FLAG_READ_ONLY)
        except (RuntimeError, MemoryError) as error:  # a damaged size can request all memory
            raise EvaluationError(
                f"{path}: not a faiss index; build it again: python -m trainer.search index {folder}"
            ) from error
        if hasattr(inner := faiss.downcast_index(self.index), "nprobe"):
            inner.nprobe = probes
        self.metadata = _parts(Path(folder), "metadata", "parquet")
        self._starts = np.cumsum([0, *(count_rows(file) for file in self.metadata)], dtype=np.int64)
        if self.index.ntotal != self._starts[-1]:
            raise EvaluationError(
                f"{path}: {self.index.ntotal} vectors, but the metadata has {self._starts[-1]} rows;"
                f" build it again: python -m trainer.search index {folder}"
            )

    def nearest(self, vectors: np.ndarray, k: int) -> list[list[dict[str, Any]]]:
        """For each unit vector (a row) the `k` nearest, nearest first: `score` (cosine) and the metadata of `row`."""
        if vectors.shape[1] != self.index.d:
            raise EvaluationError(
                f"--model: vectors of {vectors.shape[1]} dimensions, but the index has {self.index.d}: another model's"
            )
        scores, rows = self.index.search(np.ascontiguousarray(vectors, np.float32), min(k, self.index.ntotal))
        return [
            [{"score": round(float(s), 4), **self.row(int(r))} for s, r in zip(*found) if r >= 0]
            for found in zip(scores, rows)
        ]

    def row(self, number: int) -> dict[str, Any]:
        """The metadata of a vector."""
        part = int(np.searchsorted(self._starts, number, side="right")) - 1
        table = read_columns(self.metadata[part])
        found: dict[str, Any] = table.slice(number - int(self._starts[part]), 1).to_pylist()[0]
        return found


def query(args: argparse.Namespace) -> None:
    """Prints the samples nearest to a text or an image, one JSON object per line."""
    searcher = Searcher(args.folder, args.captions, args.probes)
    if args.k < 1:
        raise ConfigError("-k", [f"found {args.k}, expected at least 1"])
    settings = _settings(Path(args.folder)) if args.model is None else vars(args)
    for key in ("model", "pretrained", "precision"):
        setattr(args, key, settings[key])
    encoder = open_encoder(args)
    if args.text is not None:
        vectors = encoder.texts([args.text])
    else:
        ((_, vectors),) = encoder.images([read_file(Path(args.image))])
    for found in searcher.nearest(vectors.cpu().numpy(), args.k)[0]:
        # Other tools' metadata may hold anything: times and bytes are printed as text, NaN as null.
        plain = {key: None if isinstance(v, float) and not math.isfinite(v) else v for key, v in found.items()}
        print(json.dumps(plain, ensure_ascii=False, default=str))


def _settings(folder: Path) -> dict[str, Any]:
    try:
        settings: dict[str, Any] = json.loads((folder / SETTINGS).read_text(encoding="utf-8"))
        if not isinstance(settings["model"], str) or not isinstance(settings["pretrained"], str | None):
            raise TypeError("model, pretrained: expected text")
        _ = settings["precision"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise EvaluationError(
            f"{folder / SETTINGS}: missing or damaged ({error}); name the model that made the embeddings with --model"
        ) from error
    return settings


def _parts(folder: Path, kind: str, extension: str = "npy") -> list[Path]:
    return sorted((folder / kind).glob(f"{kind}_*.{extension}"), key=lambda path: (len(path.stem), path.stem))


def _faiss() -> Any:
    try:
        import faiss
    except ImportError as error:
        raise ConfigError("faiss", ["not installed: pip install 'winnow-clip[search]'"]) from error
    return faiss


@entry_point
def main(argv: Sequence[str] | None = None) -> None:
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(prog="python -m trainer.search", description=__doc__, formatter_class=formatter)
    commands = parser.add_subparsers(dest="command", metavar="embed | index | query", required=True)
    for name, run in (("embed", embed), ("index", index), ("query", query)):
        sub = commands.add_parser(name, help=run.__doc__, description=__doc__, formatter_class=formatter)
        sub.set_defaults(run=run)
        add_model_arguments(sub, required=name == "embed")
        if name == "query":
            sub.add_argument("folder", help="what `index` wrote")
            what = sub.add_mutually_exclusive_group(required=True)
            what.add_argument("--text", help="find what is nearest to this text")
            what.add_argument("--image", help="find what is nearest to the picture in this file")
            sub.add_argument("-k", type=int, default=10, help="how many to find (default 10)")
            sub.add_argument("--captions", action="store_true", help="search the captions instead of the images")
            sub.add_argument("--probes", type=int, default=64, help="inverted lists to read (default 64)")
        else:
            sub.add_argument("source", help="shards" + ("" if name == "embed" else ", or a folder of embeddings"))
            sub.add_argument("--out", required=name == "embed", help="folder to write")
            sub.add_argument("--part", type=int, default=100_000, help="samples in one .npy (default 100,000)")
        if name == "index":
            sub.add_argument("--lists", type=int, help="inverted lists; 0 for none (default 4 √N beyond a million)")
    args = parser.parse_args(argv)
    if getattr(args, "part", 1) < 1 or (getattr(args, "lists", None) or 0) < 0:
        parser.error("--part, --lists: expected a positive number")
    args.run(args)


if __name__ == "__main__":
    sys.exit(main())
