"""Reads the rows of a pool's files in batches: each row exactly once, clean, or with the reason why it is unusable."""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
from collections.abc import Iterator
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.pool import sidecar, wat
from pipeline.pool.column_types import hive_partition
from pipeline.pool.files import file_format, is_transient, open_parquet, reading
from pipeline.pool.heads import Split
from pipeline.pool.text_rows import text_rows
from pipeline.recipe import PoolSpec
from pipeline.schema import INLINE, carried, is_binary, is_list, is_text

BATCH_ROWS = 50_000
BATCH_BYTES = 64 << 20
WAT_ROWS = 10_000
"""Image links of a WAT file per batch."""
MAX_CAPTION_BYTES = 1 << 20
"""Maximum size of a caption; bounds memory in all steps."""
MAX_URL_BYTES = 1 << 16
REASONS = {
    "null_url": "the row has no url",
    "null_caption": "the row has no caption",
    "not_text": "the url or the caption is not text",
    "invalid_utf8": "the url or the caption is not valid UTF-8 or contains a lone surrogate",
    "caption_oversized": f"the caption is larger than {MAX_CAPTION_BYTES:,} bytes",
    "url_oversized": f"the url is larger than {MAX_URL_BYTES:,} bytes",
    "bad_line": "the line is not a JSON object, or has too many or too few fields",
    "bad_record": "a record of the WAT file is damaged",
    "bad_url": "the image link does not lead to an http or https address",
    "bad_value": "another column has a value that does not fit the column's type (set it in `pool.types`)",
    "bad_uid": "the uid in the pool is not 32 hex digits",
    "duplicate_uid": "an earlier row has the same uid",
}


def count(spec: PoolSpec, split: Split) -> int:
    """The number of rows that `read` yields for a split."""
    if split.rows is not None:
        return split.rows
    if split.row_groups is not None:
        wanted = {"caption": spec.caption} if spec.captions else {}
        return sum(len(batch) for batch in _parquet_batches(spec, split, wanted, {}))
    if file_format(split.path) == "wat":
        return sum(len(batch) for batch in _wat_batches(spec, split, {}, {}))
    each = spec.captions == "each"
    captions = (row.get(spec.caption) if row else None for row in text_rows(split.path, spec))
    return sum(max(1, len(caption)) if each and isinstance(caption, list) else 1 for caption in captions)


def read(spec: PoolSpec, split: Split, types: dict[str, pa.DataType]) -> Iterator[pa.Table]:
    """Yields the rows of a split in batches with the columns `uid, url, caption, drop_reason` and those of `types`.

    `drop_reason` is null for a usable row, else one of REASONS; url and caption then hold whatever is readable. Raises
    PoolError that names the file if it cannot be read to its end.
    """
    wanted = {"url": spec.url, "caption": spec.caption}
    wanted |= {key: column for key, column in (("uid", spec.uid), (INLINE, spec.image)) if column}
    is_wat = file_format(split.path) == "wat"
    batches = _wat_batches if is_wat else _text_batches if split.row_groups is None else _parquet_batches
    folders = hive_partition(spec, split.path)
    partition = {carried(name): value for name, value in folders.items() if carried(name) in types}
    partition |= {ours: folders[theirs] for ours, theirs in wanted.items() if theirs in folders}
    for batch in batches(spec, split, wanted, types):
        for name, value in partition.items():
            if name not in batch.column_names:
                batch = batch.append_column(name, pa.array([value] * len(batch), pa.string()))
        for name in wanted.keys() - {"uid", INLINE, *batch.column_names} - ({"url"} if spec.image else set()):
            batch = batch.append_column(name, pa.nulls(len(batch), pa.string()))
        yield _clean(batch, types)


def _clean(batch: pa.Table, types: dict[str, pa.DataType]) -> pa.Table:
    """Marks unusable rows with their reason. Gives every row a uid."""
    n = len(batch)
    reason = np.full(n, None, dtype=object)

    def mark(rows: np.ndarray, why: str) -> None:
        reason[rows & (reason == np.array(None))] = why  # the first reason wins

    for flag in ("bad_line", "not_text", "bad_record", "bad_url"):  # detected by the reader of the file
        if flag in batch.column_names:
            mark(batch[flag].to_numpy(), flag)
    if INLINE in types:
        batch = _with_inline(batch)
    texts = {}
    for name, limit in (("url", MAX_URL_BYTES), ("caption", MAX_CAPTION_BYTES)):
        text, bad_type, bad_utf8 = _as_text(batch[name])
        sizes = pc.fill_null(pc.binary_length(text), 0).to_numpy(zero_copy_only=False)
        blank = sizes == 0  # csv has no null, only empty fields
        for mask, why in (
            (bad_type, "not_text"),
            (bad_utf8, "invalid_utf8"),
            (blank, f"null_{name}"),
            (sizes > limit, f"{name}_oversized"),
        ):
            mark(mask, why)
        if (sizes > limit).any():
            # The ledger keeps a prefix, enough to identify the row.
            text = pa.array([t[:1000] if s > limit else t for t, s in zip(text.to_pylist(), sizes)], pa.string())
        texts[name] = pc.fill_null(text, "")
    uid = _uids(texts["url"], texts["caption"])
    if "uid" in batch.column_names:
        own = pc.utf8_lower(pc.fill_null(_as_text(batch["uid"])[0], ""))
        good = pc.match_substring_regex(own, "^[0-9a-f]{32}$")
        mark(~good.to_numpy(zero_copy_only=False), "bad_uid")
        uid = pc.if_else(good, own, uid)
    extras = {}
    columns = dict(zip(batch.column_names, batch.columns))  # a lookup in a wide table is a scan
    for name, dtype in types.items():
        extras[name], bad = _fit(columns[name], dtype) if name in columns else (pa.nulls(n, dtype), None)
        if bad is not None:
            mark(bad, "bad_value")
    return pa.table({"uid": uid, **texts, **extras, "drop_reason": pa.array(reason, pa.string())})


def _with_inline(batch: pa.Table) -> pa.Table:
    """Extracts the pictures from their structs. The sha256 of the picture identifies a row without a url."""
    column = batch[INLINE].combine_chunks()
    paths = [None] * len(batch)
    if pa.types.is_struct(column.type):
        if "path" in column.type.names:
            paths = [path if path and "://" in path else None for path in pc.struct_field(column, "path").to_pylist()]
        column = pc.struct_field(column, "bytes")
    pictures = column.cast(pa.binary())
    urls = batch["url"].to_pylist() if "url" in batch.column_names else [None] * len(batch)
    for i, url in enumerate(urls):
        if not url:
            body = pictures[i]
            urls[i] = paths[i] or (
                f"urn:sha256:{hashlib.sha256(body.as_buffer()).hexdigest()}" if body.is_valid else None
            )
    others = batch.drop_columns([name for name in (INLINE, "url") if name in batch.column_names])
    url_type = batch["url"].type if "url" in batch.column_names else pa.string()
    return others.append_column(INLINE, pictures).append_column("url", pa.array(urls, url_type))


def _uids(urls: pa.Array, captions: pa.Array) -> pa.Array:
    """The first 128 bits of sha256(url NUL caption), in hex."""
    pairs = zip(urls.to_pylist(), captions.to_pylist(), strict=True)
    return pa.array([hashlib.sha256(f"{u}\0{c}".encode()).hexdigest()[:32] for u, c in pairs], pa.string())


def _as_text(column: pa.ChunkedArray | pa.Array) -> tuple[pa.Array, np.ndarray, np.ndarray]:
    """A column as valid UTF-8, with masks of the values that are not text and of those with invalid UTF-8."""
    n = len(column)
    array = _decoded(column)
    none = np.zeros(n, dtype=bool)
    if pa.types.is_null(array.type):
        return pa.nulls(n, pa.string()), none, none
    if not is_text(array.type) and not is_binary(array.type):
        return pa.nulls(n, pa.string()), pc.is_valid(array).to_numpy(zero_copy_only=False), none
    raw = array.cast(pa.large_binary())
    try:
        # Arrow validates UTF-8 only when casting from binary, not from string.
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


def _decoded(column: pa.ChunkedArray | pa.Array) -> pa.Array:
    array = column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column
    if isinstance(array, pa.ExtensionArray):
        array = array.storage
    return array.dictionary_decode() if pa.types.is_dictionary(array.type) else array


def _fit(column: pa.ChunkedArray, dtype: pa.DataType) -> tuple[pa.Array, np.ndarray | None]:
    """Converts a carried column to its type in the whole pool. Returns it with a mask of the values that do not fit."""
    array = _decoded(column)
    if dtype == pa.string():
        text, not_text, _ = _as_text(array)
        return (pa.array(map(_value_text, array.to_pylist()), pa.string()) if not_text.any() else text), None
    # Integers beyond 2^53 are rounded if another file has floats.
    safe = not (pa.types.is_integer(array.type) and pa.types.is_floating(dtype))
    if is_text(array.type):
        array = _as_text(array)[0]
        array = pc.if_else(pc.equal(array, ""), pa.scalar(None, pa.string()), array)
    try:
        return array.cast(dtype, safe=safe), None
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError):
        pass
    values, bad = [], np.zeros(len(array), bool)
    for i, value in enumerate(array):
        try:
            values.append(value.cast(dtype, safe=safe))
        except (pa.ArrowInvalid, pa.ArrowNotImplementedError):
            values.append(pa.scalar(None, dtype))
            bad[i] = True
    return pa.array([value.as_py() for value in values], dtype), bad


def _value_text(value: Any) -> str | None:
    if value is None or isinstance(value, str):
        return value
    return json.dumps(value, ensure_ascii=False, default=str) if isinstance(value, list | dict | bool) else str(value)


def _parquet_batches(
    spec: PoolSpec, split: Split, wanted: dict[str, str], types: dict[str, pa.DataType]
) -> Iterator[pa.Table]:
    file = open_parquet(split.path)
    names = dict.fromkeys(file.schema_arrow.names)
    # A mapped column that is missing here is a partition column, or the url of a pool with inline pictures.
    mapped = {ours: theirs for ours, theirs in wanted.items() if theirs in names}
    extras = {name: carried(name) for name in names if carried(name) in types and name not in wanted.values()}
    drop_columns = ["step", "reason"] if split.retry else []
    groups = [file.metadata.row_group(i) for i in split.row_groups or ()]
    row_bytes = max([group.total_byte_size // max(1, group.num_rows) for group in groups], default=0)
    patterns = {carried(name): pattern for name, pattern in (spec.embeddings or {}).items() if carried(name) in types}
    row_bytes += sum(types[name].list_size * types[name].value_type.bit_width // 8 for name in patterns)
    rows = max(1, min(BATCH_ROWS, BATCH_BYTES // max(1, row_bytes)))
    first = sum(file.metadata.row_group(i).num_rows for i in range(min(split.row_groups or (0,))))
    with reading(split.path, " as parquet"), file, contextlib.ExitStack() as stack:
        vectors = {
            name: stack.enter_context(sidecar.reader(*sidecar.locate(pattern, split.path), first))
            for name, pattern in patterns.items()
        }
        read_columns = list(dict.fromkeys([*mapped.values(), *extras, *drop_columns]))
        for batch in file.iter_batches(rows, row_groups=list(split.row_groups or ()), columns=read_columns):
            if split.retry:
                drops = zip(batch["step"].to_pylist(), batch["reason"].to_pylist())
                batch = batch.filter(pa.array([is_transient(step, reason) for step, reason in drops], pa.bool_()))
            held = dict(zip(batch.schema.names, batch.columns))  # a lookup in a wide batch is a scan
            columns = {ours: held[theirs] for theirs, ours in extras.items()}
            columns |= {ours: held[theirs] for ours, theirs in mapped.items()}
            columns |= {name: take(len(batch)) for name, take in vectors.items()}
            table = pa.table(columns or {"step": batch["step"]})
            yield _explode_captions(table, spec) if "caption" in mapped else table


def _explode_captions(table: pa.Table, spec: PoolSpec) -> pa.Table:
    """Makes a row of each caption in a list, or of the first. An empty list gives a row without a caption."""
    column = table["caption"].combine_chunks()
    if not is_list(column.type):
        return table
    lengths = pc.fill_null(pc.list_value_length(column), 0).to_numpy(zero_copy_only=False)
    starts = np.cumsum(lengths) - lengths
    rows = np.maximum(lengths, 1) if spec.captions == "each" else np.ones(len(lengths), np.int64)
    parent = np.repeat(np.arange(len(lengths)), rows)
    nth = np.arange(len(parent)) - np.repeat(np.cumsum(rows) - rows, rows)
    at = pa.array(starts[parent] + nth, mask=lengths[parent] == 0)
    captions = column.drop_null().flatten().take(at)
    table = table.take(pa.array(parent))
    return table.set_column(table.column_names.index("caption"), "caption", captions)


def _wat_batches(
    spec: PoolSpec, split: Split, wanted: dict[str, str], types: dict[str, pa.DataType]
) -> Iterator[pa.Table]:
    with reading(split.path, " as WAT"):
        links = wat.read_links(split.path)
        while chunk := list(itertools.islice(links, WAT_ROWS)):
            columns: dict[str, Any] = {"url": [], "caption": [], "page_url": []}
            for link in chunk:
                for name, values in columns.items():
                    values.append(_to_bytes(getattr(link, name)))
            texts = {name: pa.array(values, pa.large_binary()) for name, values in columns.items()}
            mapped = {ours: texts[theirs] for ours, theirs in wanted.items()}
            others = {carried(name): column for name, column in texts.items() if name not in wanted.values()}
            flags = {why: [link.problem == why for link in chunk] for why in ("bad_record", "bad_url")}
            yield pa.table({**mapped, **others, **flags})


def _text_batches(
    spec: PoolSpec, split: Split, wanted: dict[str, str], types: dict[str, pa.DataType]
) -> Iterator[pa.Table]:
    rows: list[dict[str, Any] | None] = []
    held = 0
    for row in text_rows(split.path, spec):
        for each in _captions(row, spec):
            rows.append(each)
            held += sum(len(v) for v in each.values() if isinstance(v, str)) if each else 0
        if len(rows) >= BATCH_ROWS or held > BATCH_BYTES:
            yield _text_table(rows, wanted, types)
            rows, held = [], 0
    if rows:
        yield _text_table(rows, wanted, types)


def _captions(row: dict[str, Any] | None, spec: PoolSpec) -> Iterator[dict[str, Any] | None]:
    captions = row.get(spec.caption) if row and spec.captions else None
    if not isinstance(captions, list):
        yield row
        return
    assert row is not None
    for caption in (captions if spec.captions == "each" else captions[:1]) or [None]:
        yield row | {spec.caption: caption}


def _text_table(rows: list[dict[str, Any] | None], wanted: dict[str, str], types: dict[str, pa.DataType]) -> pa.Table:
    def values(name: str) -> list[Any]:
        return [row.get(name) if row else None for row in rows]

    # A column that none of these rows has is missing from the file, or is a partition column.
    present = {ours: theirs for ours, theirs in wanted.items() if any(row and theirs in row for row in rows)}
    table = {
        ours: pa.array([_to_bytes(v) for v in values(theirs)], pa.large_binary()) for ours, theirs in present.items()
    }
    names = dict.fromkeys(name for row in rows if row for name in row if name not in wanted.values())
    for name in names:
        if carried(name) in types:
            table[carried(name)] = pa.array([_plain(v) for v in values(name)], pa.string())
    # Mark numbers in place of text. Parquet shows them in the column's type, JSON only in each value.
    no_text = [any(v is not None and not isinstance(v, str) for v in row) for row in zip(*map(values, wanted.values()))]
    return pa.table({**table, "not_text": no_text, "bad_line": [row is None for row in rows]})


def _to_bytes(value: Any) -> bytes | None:
    """Encodes text, reversing surrogateescape. Lone surrogates give invalid UTF-8."""
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
