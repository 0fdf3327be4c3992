"""Takedown lists: URLs, domains, samples and pictures that must not be in a dataset."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.text.url import InvalidUrlError, canonical, listed_domain, web_address
from trainer.hamming import Index

KINDS = {"uid": ("uid",), "url": ("url",), "domain": ("url",), "sha256": ("sha256",), "phash": ("phash",)}
"""The kinds of entries, and the columns that each is compared with."""
DEFAULT_HAMMING = 4
"""Bits in which a picture may differ from a `phash` entry without a distance. The same default as in `near_dedup`."""
MAX_HAMMING = 10
_HEX = {"uid": re.compile(r"[0-9a-f]{32}"), "sha256": re.compile(r"[0-9a-f]{64}"), "phash": re.compile(r"[0-9a-f]{16}")}


class TakedownList:
    """The entries of a text file, one per line: `KIND VALUE`. A line that begins with `#` is a comment.

    - `uid 8f…`: a sample, 32 hex digits
    - `url https://example.org/a.jpg`: a URL, in any equivalent form (`pipeline.text.url.canonical`)
    - `domain example.org`: a host and all hosts below it
    - `sha256 1f…`: a picture, by the digest of its bytes as published, 64 hex digits
    - `phash 00ff… 4`: pictures by 64-bit perceptual hash (imagehash's pHash, 16 hex digits) and the number of bits in
      which they may differ from it, 0 to 10; DEFAULT_HAMMING if the line has no number

    `path` is a local file or a URL that fsspec opens. Raises OSError, or ValueError with the file and line. Takes about
    200 bytes of memory per entry.
    """

    def __init__(self, path: str) -> None:
        with fsspec.open(path, "rb") as file:
            data: bytes = file.read()
        self.digest = hashlib.sha256(data).hexdigest()
        """SHA-256 of the file, in hex."""
        self._values: dict[str, set[str]] = {kind: set() for kind in KINDS}
        hashes: dict[int, set[int]] = {}
        for number, raw in enumerate(data.split(b"\n"), 1):
            try:
                line = raw.decode("utf-8").strip()
                if not line or line.startswith("#"):
                    continue
                kind, _, value = line.partition(" ")
                if kind == "phash":
                    digits, _, distance = value.strip().partition(" ")
                    bits = _distance(distance.strip())
                    hashes.setdefault(bits, set()).add(int(_checked(kind, digits), 16))
                    self._values[kind].add(value)
                else:
                    self._values[kind].add(_checked(kind, value.strip()))
            except UnicodeDecodeError:
                raise ValueError(f"{path}:{number}: not UTF-8") from None
            except KeyError:
                raise ValueError(
                    f"{path}:{number}: found {line[:80]!r}, expected one of {', '.join(KINDS)} and a value"
                ) from None
            except ValueError as error:
                raise ValueError(f"{path}:{number}: {error}") from None
        if not len(self):
            raise ValueError(f"{path}: lists nothing; expected lines such as `url https://example.org/a.jpg`")
        self._hashes = _indexed(hashes)

    def __len__(self) -> int:
        return sum(map(len, self._values.values()))

    @property
    def kinds(self) -> list[str]:
        """The kinds of entries in the list."""
        return [kind for kind, values in self._values.items() if values]

    def find(self, rows: pa.Table, kinds: Iterable[str]) -> tuple[pa.StringArray, pa.StringArray]:
        """For each row, the kind and the text of the entry that names it, or null.

        `rows` has the columns of these kinds. If it also has the column `captions`, a `uid` names the row into which
        that sample was merged, too. If several entries name a row, the first kind in KINDS counts.
        """
        found: list[str | None] = [None] * len(rows)
        entries: list[str | None] = [None] * len(rows)
        for kind in KINDS:
            if kind not in kinds or not self._values[kind]:
                continue
            (column,) = KINDS[kind]
            for i, entry in self._matches(kind, rows[column]):
                if found[i] is None:
                    found[i], entries[i] = kind, entry
        kind, entry = pa.array(found, pa.string()), pa.array(entries, pa.string())
        if "uid" in kinds and "captions" in rows.column_names:
            captions = rows["captions"].combine_chunks()
            merged, uids = self.find(pa.table({"uid": pc.struct_field(captions.flatten(), "uid")}), ["uid"])
            owners = pc.list_parent_indices(captions).filter(merged.is_valid()).cast(pa.int64())
            at = pc.index_in(pa.array(np.arange(len(rows))), owners)
            kind = pc.coalesce(kind, merged.drop_null().take(at))
            entry = pc.coalesce(entry, uids.drop_null().take(at))
        return kind, entry

    def _matches(self, kind: str, column: pa.ChunkedArray) -> Iterable[tuple[int, str]]:
        """The index of each row that an entry of this kind names, with the entry."""
        if kind == "phash":
            return self._near(column)
        listed = self._values[kind]
        values: Iterable[str | None] = column.to_pylist()
        if kind == "domain":
            return ((i, entry) for i, url in enumerate(values) if (entry := listed_domain(_host(url or ""), listed)))
        if kind == "url":
            values = (None if url is None else canonical(url) for url in values)
        else:
            values = (None if value is None else value.lower() for value in values)
        return ((i, value) for i, value in enumerate(values) if value in listed)

    def _near(self, column: pa.ChunkedArray) -> Iterable[tuple[int, str]]:
        rows = np.flatnonzero(column.is_valid().to_numpy())
        # Reinterpret signed hashes as unsigned; a safe cast would reject negative ones.
        hashes = column.drop_null().cast(pa.uint64(), safe=False).to_numpy()
        for distance, listed, index in self._hashes:
            places, _ = index.nearest(hashes)
            near = places >= 0
            entries = (f"{value:016x} {distance}" for value in listed[places[near]].tolist())
            yield from zip(rows[near].tolist(), entries)


def _checked(kind: str, value: str) -> str:
    """The normal form of a value. Raises ValueError, or KeyError for an unknown kind."""
    if kind not in KINDS:
        raise KeyError(kind)
    if kind in _HEX:
        if not _HEX[kind].fullmatch(value.lower()):
            digits = {"uid": 32, "sha256": 64, "phash": 16}[kind]
            raise ValueError(f"found {kind} {value[:80]!r}, expected {digits} hex digits")
        return value.lower()
    if kind == "domain":
        host = _host(f"http://{value}/")
        if not host or any(c in value for c in "/@:?#"):
            raise ValueError(f"found domain {value[:80]!r}, expected a host name such as example.org")
        return host
    if not _host(value):
        raise ValueError(f"found url {value[:80]!r}, expected an address that begins with http:// or https://")
    return canonical(value)


def _distance(text: str) -> int:
    if not text:
        return DEFAULT_HAMMING
    if not text.isascii() or not text.isdigit() or int(text) > MAX_HAMMING:
        raise ValueError(f"found the distance {text[:20]!r}, expected 0 to {MAX_HAMMING} bits")
    return int(text)


def _host(url: str) -> str:
    """The host that the fetcher contacts for a URL, without a trailing dot; "" if the URL is not a web address."""
    try:
        return web_address(url).host.removesuffix(".")
    except InvalidUrlError:
        return ""


def _indexed(hashes: dict[int, set[int]]) -> list[tuple[int, np.ndarray, Index]]:
    """Each distance, ascending, with the hashes listed with it and an index of them."""
    listed = {distance: np.array(sorted(values), np.uint64) for distance, values in sorted(hashes.items())}
    return [(distance, values, Index(values, distance)) for distance, values in listed.items()]
