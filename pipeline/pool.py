"""Reading a pool: parquet, csv, tsv or jsonl, one file or a thousand, into batches of clean rows.

Whatever a file holds, each of its rows comes out exactly once: clean, or with the reason why it cannot be used.
"""

from __future__ import annotations

import contextlib
import csv
import functools
import glob
import hashlib
import io
import json
import os
import re
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipeline.compressed import COMPRESSIONS, open_plain
from pipeline.fetch.reasons import find
from pipeline.recipe import PoolSpec
from pipeline.storage import Store

FORMATS = ("parquet", "csv", "tsv", "jsonl")
BATCH_ROWS = 50_000
FOOTERS_AT_ONCE = 32
MAX_CAPTION_BYTES = 1 << 20
"""A longer caption is no caption, and would only cost memory everywhere."""
MAX_URL_BYTES = 1 << 16
REASONS = {
    "null_url": "the row has no url",
    "null_caption": "the row has no caption",
    "not_text": "the url or the caption is not text",
    "invalid_utf8": "the url or the caption is not valid UTF-8, or holds a lone surrogate",
    "caption_oversized": f"the caption is larger than {MAX_CAPTION_BYTES:,} bytes",
    "url_oversized": f"the url is larger than {MAX_URL_BYTES:,} bytes",
    "bad_line": "the line is not a JSON object, or has too many or too few fields",
    "bad_uid": "the pool's own uid is not 32 hex digits",
    "duplicate_uid": "an earlier row has the same uid",
}


_FETCHING = re.compile(r"(download|read_shards)(\.\d+)?")
"""The labels of the steps whose drops may be the web's fault."""


@dataclass(frozen=True)
class Split:
    """A piece of the pool that one task reads: some row groups of a parquet file, or a whole text file."""

    path: str
    row_groups: tuple[int, ...] | None = None
    retry: bool = False
    """The file is a ledger of drops, and only its transient failures are rows of the pool."""
    rows: int | None = None
    """How many there are, where that is known without reading them."""


@dataclass(frozen=True)
class _Footer:
    """What the end of a parquet file says."""

    schema: pa.Schema
    rows: tuple[int, ...]
    """Of each row group."""


def _files(spec: PoolSpec) -> dict[str, _Footer | None]:
    """The files of a pool in their order, those that are parquet with their footers: read once until a file changes,
    many at a time, since a store far away takes its time for each."""
    paths = find_files(spec)
    return _with_footers(tuple(paths), hashlib.sha256(json.dumps(_stamps(paths)).encode()).digest())


@functools.lru_cache(maxsize=1)
def _with_footers(paths: tuple[str, ...], _state: bytes) -> dict[str, _Footer | None]:
    schemas: dict[pa.Schema, pa.Schema] = {}  # mostly one and the same

    def read(path: str) -> _Footer | None:
        if _format(path) != "parquet":
            return None
        with _open_parquet(path) as file:
            rows = tuple(file.metadata.row_group(i).num_rows for i in range(file.metadata.num_row_groups))
            return _Footer(schemas.setdefault(file.schema_arrow, file.schema_arrow), rows)

    with ThreadPoolExecutor(FOOTERS_AT_ONCE) as threads:
        return dict(zip(paths, threads.map(read, paths)))


def find_files(spec: PoolSpec) -> list[str]:
    """The files of a pool in a fixed order; ValueError says what was not found."""
    files: list[str] = []
    if spec.retry is not None:
        _check_retry(spec.retry)
    for path in [spec.path] if isinstance(spec.path, str) else spec.path:
        if "://" in path:
            fs, root = fsspec.core.url_to_fs(path)
            found = fs.glob(root) if glob.has_magic(root) else fs.find(root) if fs.isdir(root) else [root]
            names = [fs.unstrip_protocol(name) for name in found]
        elif os.path.isdir(path):
            names = [os.path.join(folder, name) for folder, _, files_ in os.walk(path) for name in files_]
        else:
            names = glob.glob(path, recursive=True) if glob.has_magic(path) else [path] if os.path.exists(path) else []
        explicit = names == [path]
        usable = [n for n in names if _format(n) and not os.path.basename(n).startswith((".", "_"))]
        if not names:
            raise ValueError(
                f"path: {path} does not exist" if not glob.has_magic(path) else f"path: {path} matches no file"
            )
        if not usable:
            kinds = ", ".join(FORMATS) + f" (also .{' and .'.join(COMPRESSIONS)})"
            raise ValueError(f"path: {path} is not one of {kinds}" if explicit else f"path: {path} holds no {kinds}")
        files += sorted(n if "://" in n else os.path.abspath(n) for n in usable)
    return list(dict.fromkeys(files))


def _check_retry(run: str) -> None:
    """ValueError unless `run` is a finished run with something to try again."""
    store = Store(run)
    if not store.exists("run.json"):
        raise ValueError(f"retry: {run} is not the folder of a run")
    books = store.read_if_there("funnel.json")
    if books is None:
        raise ValueError(f"retry: {run} is not finished: there is no funnel.json; give its own command again first")
    try:
        steps = {line["step"]: line["dropped"] for line in json.loads(books)["steps"]}
    except (ValueError, KeyError, TypeError):
        raise ValueError(f"retry: {run}/funnel.json is not the funnel of a run") from None
    fetching = [step for step in steps if _FETCHING.fullmatch(step)]
    if not fetching:
        raise ValueError(f"retry: {run} has no step download; its steps are {', '.join(steps)}")
    if not any(_is_transient(step, reason) for step in fetching for reason in steps[step]):
        raise ValueError(f"retry: {run} dropped no row for a reason that may pass; see {run}/funnel.json")


@functools.lru_cache(maxsize=1000)
def _is_transient(step: str, reason: str) -> bool:
    try:
        return bool(_FETCHING.fullmatch(step)) and find(reason).transient
    except KeyError:  # a reason of the step's own
        return False


def columns(spec: PoolSpec) -> list[str]:
    """The further columns that come along with url and caption; ValueError if the pool cannot be read that way.

    Every file must have the mapped columns. Columns that are not in every file are filled with nulls.
    """
    extras: dict[str, None] = {}
    for path, footer in _files(spec).items():
        names = footer.schema.names if footer else _column_names(path)
        for key, column in (("url", spec.url), ("caption", spec.caption), ("uid", spec.uid)):
            if column is not None and column not in names:
                raise ValueError(f"{key}: {path} has no column {column!r}; it has {', '.join(names) or 'none'}")
        extras |= dict.fromkeys(n for n in names if n not in (spec.url, spec.caption, spec.uid))
    if spec.columns is not None:
        missing = [c for c in spec.columns if c not in extras]
        if missing:
            raise ValueError(
                f"columns: no file has {', '.join(missing)}; there are {', '.join(extras) or 'no further ones'}"
            )
        return list(spec.columns)
    return list(extras)


def extra_types(spec: PoolSpec, extras: list[str]) -> dict[str, pa.DataType]:
    """The type of each further column: a parquet file's own, as long as all files agree; text otherwise."""
    types: dict[str, pa.DataType] = {}
    for footer in _files(spec).values():
        for name in extras:
            if footer is None:
                theirs = pa.string()
            elif name in footer.schema.names:
                theirs = _plain_type(footer.schema.field(name).type)
            else:
                continue
            types[name] = theirs if types.get(name, theirs) == theirs else pa.string()
    return types


def splits(spec: PoolSpec, rows: int = 1_000_000) -> list[Split]:
    """The pieces to read in parallel, of about `rows` rows where the format allows it; the same on every machine."""
    pieces: list[Split] = []
    retry = spec.retry is not None
    for path, footer in _files(spec).items():
        if footer is None:
            pieces.append(Split(path))
            continue
        groups: list[int] = []
        held = 0
        for i, size in enumerate(footer.rows):
            groups.append(i)
            held += size
            if held >= rows or i == len(footer.rows) - 1:
                pieces.append(Split(path, tuple(groups), retry, None if retry else held))
                groups, held = [], 0
        if not footer.rows:
            pieces.append(Split(path, (), retry, None if retry else 0))
    return pieces


def count(split: Split) -> int:
    """How many rows `read` will give for a split."""
    if split.rows is not None:
        return split.rows
    if split.retry:
        return sum(len(batch) for batch in _parquet_batches(split, {}, {}))
    return sum(1 for _ in _text_rows(split.path))


def stamp(spec: PoolSpec) -> list[list[Any]]:
    """What tells one state of the pool from another without reading it: name, size and time or tag of each file."""
    return _stamps(find_files(spec))


def _stamps(paths: list[str]) -> list[list[Any]]:
    stamps: list[list[Any]] = []
    for path in paths:
        if "://" in path:
            fs, root = fsspec.core.url_to_fs(path)
            info = fs.info(root)
            stamps.append([os.path.basename(path), info["size"], str(info.get("ETag") or info.get("mtime") or "")])
        else:
            stat = os.stat(path)
            stamps.append([os.path.basename(path), stat.st_size, str(stat.st_mtime_ns)])
    return stamps


def read(spec: PoolSpec, split: Split, types: dict[str, pa.DataType]) -> Iterator[pa.Table]:
    """The rows of a split in batches with the columns `uid, url, caption, drop_reason` and the further ones of `types`.

    `drop_reason` is null for a usable row, else one of REASONS; then url and caption hold what could be saved.
    """
    wanted = {"url": spec.url, "caption": spec.caption, **({"uid": spec.uid} if spec.uid else {})}
    if split.row_groups is None:
        raw: Iterable[pa.Table] = _text_batches(split.path, wanted, types)
    else:
        raw = _parquet_batches(split, wanted, types)
    for batch in raw:
        yield _clean(batch, types)


def _clean(batch: pa.Table, types: dict[str, pa.DataType]) -> pa.Table:
    """Decides which rows can be used and names the rest; gives every row a uid."""
    n = len(batch)
    reason = np.full(n, None, dtype=object)

    def mark(rows: np.ndarray, why: str) -> None:
        reason[rows & (reason == np.array(None))] = why  # the first reason found stands

    for flag in ("bad_line", "not_text"):  # what only the reader of a text file could see
        if flag in batch.column_names:
            mark(batch[flag].to_numpy(), flag)
    texts = {}
    for name, limit in (("url", MAX_URL_BYTES), ("caption", MAX_CAPTION_BYTES)):
        text, bad_type, bad_utf8 = _as_text(batch[name])
        sizes = pc.fill_null(pc.binary_length(text), 0).to_numpy(zero_copy_only=False)
        blank = sizes == 0  # an empty field is how csv spells null
        for mask, why in (
            (bad_type, "not_text"),
            (bad_utf8, "invalid_utf8"),
            (blank, f"null_{name}"),
            (sizes > limit, f"{name}_oversized"),
        ):
            mark(mask, why)
        if (sizes > limit).any():
            # What the ledger keeps of it is enough to recognise it by.
            text = pa.array([t[:1000] if s > limit else t for t, s in zip(text.to_pylist(), sizes)], pa.string())
        texts[name] = pc.fill_null(text, "")
    uid = _uids(texts["url"], texts["caption"])
    if "uid" in batch.column_names:
        own = pc.utf8_lower(pc.fill_null(_as_text(batch["uid"])[0], ""))
        good = pc.match_substring_regex(own, "^[0-9a-f]{32}$")
        mark(~good.to_numpy(zero_copy_only=False), "bad_uid")
        uid = pc.if_else(good, own, uid)
    extras = {
        name: _fit(batch[name], dtype) if name in batch.column_names else pa.nulls(n, dtype)
        for name, dtype in types.items()
    }
    return pa.table({"uid": uid, **texts, **extras, "drop_reason": pa.array(reason, pa.string())})


def _uids(urls: pa.Array, captions: pa.Array) -> pa.Array:
    """The first 128 bits of sha256(url NUL caption), in hex."""
    pairs = zip(urls.to_pylist(), captions.to_pylist(), strict=True)
    return pa.array([hashlib.sha256(f"{u}\0{c}".encode()).hexdigest()[:32] for u, c in pairs], pa.string())


def _as_text(column: pa.ChunkedArray | pa.Array) -> tuple[pa.Array, np.ndarray, np.ndarray]:
    """A column as valid UTF-8, with masks of the values that are no text and of those that are not valid UTF-8."""
    n = len(column)
    array = column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column
    if pa.types.is_dictionary(array.type):
        array = array.dictionary_decode()
    none = np.zeros(n, dtype=bool)
    if pa.types.is_null(array.type):
        return pa.nulls(n, pa.string()), none, none
    stringy = (pa.types.is_string, pa.types.is_large_string, pa.types.is_string_view)
    binary = (pa.types.is_binary, pa.types.is_large_binary, pa.types.is_binary_view)
    if not any(test(array.type) for test in (*stringy, *binary)):
        return pa.nulls(n, pa.string()), pc.is_valid(array).to_numpy(zero_copy_only=False), none
    raw = array.cast(pa.large_binary())
    try:
        # The cast alone trusts what claims to be text already; from binary it validates.
        return raw.cast(pa.string()), none, none
    except pa.ArrowInvalid:
        pass
    values = raw.to_pylist()
    bad = np.zeros(n, dtype=bool)
    for i, value in enumerate(values):
        if value is None:
            continue
        try:
            values[i] = value.decode("utf-8")
        except UnicodeDecodeError:
            bad[i] = True
            values[i] = value.decode("utf-8", "replace")
    return pa.array(values, pa.string()), none, bad


def _fit(column: pa.ChunkedArray, dtype: pa.DataType) -> pa.Array:
    """A further column in the type that it has over the whole pool."""
    array = column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column
    if dtype == pa.string():
        text, not_text, _ = _as_text(array)
        if not not_text.any():
            return text
        return pa.array([None if v is None else str(v) for v in array.to_pylist()], pa.string())
    return array.cast(dtype)


def _plain_type(dtype: pa.DataType) -> pa.DataType:
    """Text in any encoding is text."""
    if pa.types.is_dictionary(dtype):
        dtype = dtype.value_type
    texts = (pa.types.is_string, pa.types.is_large_string, pa.types.is_string_view)
    return pa.string() if pa.types.is_null(dtype) or any(test(dtype) for test in texts) else dtype


def _format(path: str) -> str | None:
    """The format that a file name promises, compression aside."""
    parts = os.path.basename(path).lower().split(".")[1:]
    if parts and parts[-1] in COMPRESSIONS and parts[-1:] != ["parquet"]:
        parts.pop()
    aliases = {"pq": "parquet", "ndjson": "jsonl"}
    kind = aliases.get(parts[-1], parts[-1]) if parts else None
    return kind if kind in FORMATS else None


def _open_parquet(path: str) -> pq.ParquetFile:
    try:
        if "://" in path:
            return pq.ParquetFile(fsspec.open(path, "rb").open())
        return pq.ParquetFile(path)
    except (pa.ArrowInvalid, OSError) as error:
        raise ValueError(f"path: {path} cannot be read as parquet: {str(error).splitlines()[0]}") from None


def _parquet_batches(split: Split, wanted: dict[str, str], types: dict[str, pa.DataType]) -> Iterator[pa.Table]:
    file = _open_parquet(split.path)
    here = [name for name in types if name in file.schema_arrow.names]
    why = ["step", "reason"] if split.retry else []
    for batch in file.iter_batches(
        BATCH_ROWS, row_groups=list(split.row_groups or ()), columns=[*wanted.values(), *here, *why]
    ):
        if split.retry:
            whys = zip(batch["step"].to_pylist(), batch["reason"].to_pylist())
            batch = batch.filter(pa.array([_is_transient(step, reason) for step, reason in whys], pa.bool_()))
        columns = {**{ours: batch[theirs] for ours, theirs in wanted.items()}, **{name: batch[name] for name in here}}
        yield pa.table(columns or {"step": batch["step"]})


@contextlib.contextmanager
def _open_text(path: str) -> Iterator[io.TextIOBase]:
    """A text file, decompressed; bytes that are not UTF-8 come through as lone surrogates, to be found later."""
    with open_plain(path) as file:
        yield io.TextIOWrapper(file, "utf-8-sig", "surrogateescape", newline="")


def _column_names(path: str) -> list[str]:
    """Of a text file."""
    kind = _format(path)
    try:
        if kind == "jsonl":
            names: dict[str, None] = {}
            for i, row in enumerate(_text_rows(path)):
                names |= dict.fromkeys(row or ())
                if i == 1000:
                    break
            return list(names)
        with _open_text(path) as text:
            return next(csv.reader(text, delimiter="\t" if kind == "tsv" else ","), [])
    except (OSError, EOFError, UnicodeError, csv.Error) as error:
        raise ValueError(f"path: {path} cannot be read: {error}") from None


def _text_rows(path: str) -> Iterator[dict[str, Any] | None]:
    """The rows of a csv, tsv or jsonl file as dicts; None for a line that is no row."""
    kind = _format(path)
    with _open_text(path) as text:
        if kind == "jsonl":
            for line in text:
                if not line.strip():
                    continue
                try:
                    row = json.loads(line)
                except ValueError:
                    row = None
                yield row if isinstance(row, dict) else None
            return
        csv.field_size_limit(1 << 30)
        # A NUL ends the line for the csv module of Python 3.10; nobody means one.
        lines = (line.replace("\0", "") for line in text)
        if kind == "tsv":
            rows: Iterator[list[str]] = csv.reader(lines, delimiter="\t", quoting=csv.QUOTE_MINIMAL)
        else:
            rows = csv.reader(lines)
        header = next(rows, [])
        for fields in rows:
            if fields:
                yield dict(zip(header, fields)) if len(fields) == len(header) else None


def _text_batches(path: str, wanted: dict[str, str], types: dict[str, pa.DataType]) -> Iterator[pa.Table]:
    rows: list[dict[str, Any] | None] = []
    held = 0
    for row in _text_rows(path):
        rows.append(row)
        held += sum(len(v) for v in row.values() if isinstance(v, str)) if row else 0
        if len(rows) == BATCH_ROWS or held > 64 << 20:
            yield _text_table(rows, wanted, types)
            rows, held = [], 0
    if rows:
        yield _text_table(rows, wanted, types)


def _text_table(rows: list[dict[str, Any] | None], wanted: dict[str, str], types: dict[str, pa.DataType]) -> pa.Table:
    def values(name: str) -> list[Any]:
        return [row.get(name) if row else None for row in rows]

    table = {
        ours: pa.array([_to_bytes(v) for v in values(theirs)], pa.large_binary()) for ours, theirs in wanted.items()
    }
    table |= {name: pa.array([_plain(v) for v in values(name)], pa.string()) for name in types}
    # A number where text belongs: parquet tells it by the column's type, JSON only value by value.
    no_text = [any(v is not None and not isinstance(v, str) for v in row) for row in zip(*map(values, wanted.values()))]
    return pa.table({**table, "not_text": no_text, "bad_line": [row is None for row in rows]})


def _to_bytes(value: Any) -> bytes | None:
    """Text as bytes, undoing surrogateescape; a lone surrogate stays invalid UTF-8."""
    if value is None:
        return None
    if not isinstance(value, str):
        return json.dumps(value).encode()
    try:
        return value.encode("utf-8")
    except UnicodeEncodeError:
        try:
            return value.encode("utf-8", "surrogateescape")
        except UnicodeEncodeError:
            return value.encode("utf-8", "surrogatepass")


def _plain(value: Any) -> str | None:
    if value is None:
        return None
    text = value if isinstance(value, str) else json.dumps(value)
    return text.encode("utf-8", "replace").decode("utf-8")
