"""Builds the list of entries: the words and phrases that stand for concepts in `match_entries` and `balance`.

    python -m pipeline.entries entries.tsv --corpus wiki.txt.zst --titles views.tsv.gz --wordnet WordNet-3.0/dict
    python -m pipeline.entries entries.tsv --captions pool/ --caption-column text

Takes entries from the sources that you name. The default thresholds are those of MetaCLIP (Xu et al., ICLR 2024), whose
list has 500,000 entries:

- a corpus, for example the text of the English Wikipedia, one paragraph per line: the words that occur at least 100
  times, and the pairs of adjacent words that occur as often and have a pointwise mutual information of at least 30.
  This is the ratio n(a b) · N / (n(a) · n(b)), for N words in all: the pair is 30 times as frequent as by chance. (The
  threshold is not on a logarithm: the base-2 logarithm is at most log2(N / n(a b)), which does not reach 30.)
- captions, for example the captions of the pool: as for a corpus, but read from parquet, csv, tsv, jsonl or json.
- titles with views, lines of title, tab and number: the titles with at least 70 views, summed over their lines.
- WordNet: the first word of each synset in the files data.noun, data.verb, data.adj and data.adv.

Files may end in .gz, .zst or .bz2. Entries are written in normal form, sorted: equal sources give equal bytes. The
table has one line per entry, with its origin: `wordnet` is 1, or `word_count`, `pair_count` and `pmi`, or `views` are
given. OUT.sources.json lists the sources with their sizes, thresholds and numbers of entries.

Counts are spilled to a temporary folder (see TMPDIR) and take about as much space as the text itself. Memory: about
1 GB, whatever the size of the sources.
"""

from __future__ import annotations

import argparse
import codecs
import gzip
import json
import os
import sys
import tempfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeElapsedColumn

from pipeline import pool
from pipeline.compressed import open_plain, plain_name
from pipeline.pool import PoolError
from pipeline.recipe import PoolSpec
from pipeline.scheduler import spool
from pipeline.storage import Store
from pipeline.text.matching import COLUMN, normalised
from trainer.errors import InputError
from trainer.terminal import Console, entry_point

BLOCK_BYTES = 8 << 20
"""Text counted at a time."""
BYTES_PER_PARTITION = 256 << 20
"""Stored bytes of a source whose counts are summed at a time."""
COUNTS = pa.schema([("key", pa.string()), ("count", pa.int64())])
PARTS_OF_SPEECH = ("noun", "verb", "adj", "adv")
PROVENANCE = ("wordnet", "word_count", "pair_count", "pmi", "views")


class EntriesError(InputError):
    """A source cannot be used. The message names the file, what was found and what was expected."""


@dataclass
class Entries:
    """Entries with their statistics and their sources."""

    found: dict[str, dict[str, Any]] = field(default_factory=dict)
    sources: list[dict[str, Any]] = field(default_factory=list)

    def add(self, entries: dict[str, dict[str, Any]], **source: Any) -> None:
        new = sum(entry not in self.found for entry in entries)
        for entry, provenance in entries.items():
            # If two corpora have an entry, the statistics of the first are kept.
            self.found[entry] = {**provenance, **self.found.get(entry, {})}
        self.sources.append({**source, "entries": len(entries), "new": new})

    def table(self) -> bytes:
        lines = ["\t".join([COLUMN, *PROVENANCE])]
        for entry in sorted(self.found):
            known = self.found[entry]
            lines.append("\t".join([entry, *(str(known.get(name, "")) for name in PROVENANCE)]))
        return ("\n".join(lines) + "\n").encode()


class _Tally:
    """Sums counts of keys in files, so that memory does not grow with the number of keys."""

    def __init__(self, folder: str, size: int) -> None:
        self._store, self._names = Store(folder), list[str]()
        self._parts = 1 + size // BYTES_PER_PARTITION

    def add(self, keys: pa.Array, counts: pa.Array) -> None:
        import pandas as pd

        part = pd.util.hash_array(keys.to_numpy(zero_copy_only=False)) % np.uint64(self._parts)
        self._names.append(f"{len(self._names):06d}.arrow")
        table = pa.table([keys, counts], schema=COUNTS)
        spool.write(self._store, self._names[-1], table, part.astype(np.int64), self._parts)

    def totals(self, at_least: int) -> Iterator[tuple[str, int]]:
        for part in range(self._parts):
            table = spool.read(self._store, self._names, part, COUNTS).group_by("key").aggregate([("count", "sum")])
            table = table.filter(pc.greater_equal(table["count_sum"], at_least))
            yield from zip(table["key"].to_pylist(), table["count_sum"].to_pylist())


def corpus_entries(
    blocks: Iterator[pa.Array], size: int, min_count: int, min_pmi: float
) -> tuple[dict[str, dict[str, Any]], int]:
    """Returns the frequent words and the collocations of texts, with their counts, and the total number of words."""
    total = 0
    with tempfile.TemporaryDirectory() as folder:
        tally = _Tally(folder, size)
        for texts in blocks:
            split = pc.split_pattern(normalised(texts), " ")
            words, row = pc.list_flatten(split), pc.list_parent_indices(split)
            pairs = pc.binary_join_element_wise(words[:-1], words[1:], " ").filter(pc.equal(row[1:], row[:-1]))
            counted = pc.value_counts(pa.concat_arrays([words, pairs]))
            filled = pc.not_equal(counted.field(0), "")  # an empty text has one empty word
            tally.add(counted.field(0).filter(filled), counted.field(1).filter(filled))
            total += pc.sum(pc.not_equal(words, "")).as_py() or 0
        counts = dict(tally.totals(min_count))
    entries: dict[str, dict[str, Any]] = {}
    for key, n in counts.items():
        first, space, second = key.partition(" ")
        if not space:
            entries[key] = {"word_count": n}
        elif (pmi := n * total / (counts[first] * counts[second])) >= min_pmi:
            entries[key] = {"pair_count": n, "pmi": round(pmi, 1)}
    return entries, total


def title_entries(files: Sequence[str], size: int, min_views: int, advance: Callable[[int], Any]) -> dict[str, Any]:
    """The titles viewed at least `min_views` times, with their views."""
    with tempfile.TemporaryDirectory() as folder:
        tally = _Tally(folder, size)
        for path in files:
            number = 0
            for text in _blocks(path, advance):
                titles, views = [], []
                for line in text.split("\n"):
                    number += 1
                    title, tab, count = line.rstrip("\r").rpartition("\t")
                    if not tab and not count:
                        continue
                    if not (tab and count.isascii() and count.isdigit() and len(count) < 19):
                        raise EntriesError(
                            f"{path}:{number}: expected title, tab and number of views, found {line!r:.99}"
                        )
                    titles.append(title)
                    views.append(int(count))
                keys = normalised(pa.array(titles, pa.string()))
                filled = pc.not_equal(keys, "")
                tally.add(keys.filter(filled), pa.array(views, pa.int64()).filter(filled))
        return {title: {"views": views} for title, views in tally.totals(min_views)}


def wordnet_entries(folder: str) -> dict[str, Any]:
    """The first word of each synset in a folder of WordNet's database files (WNDB)."""
    words = []
    for path in _wordnet_files(folder):
        lines = (line for text in _blocks(path, lambda _: None) for line in text.split("\n"))
        for number, line in enumerate(lines, 1):
            if not line or line.startswith("  "):  # the license
                continue
            fields = line.split(" ", 5)
            if len(fields) < 6 or len(fields[0]) != 8 or not fields[0].isdigit():
                raise EntriesError(f"{path}:{number}: expected a synset of WordNet, found {line.rstrip()!r:.99}")
            words.append(fields[4].partition("(")[0])  # adjectives may carry a marker, as in galore(ip)
    return {word: {"wordnet": 1} for word in normalised(pa.array(words, pa.string())).to_pylist() if word}


def _wordnet_files(folder: str) -> list[str]:
    return [f"{folder.rstrip('/')}/data.{part}" for part in PARTS_OF_SPEECH]


def _blocks(path: str, advance: Callable[[int], Any]) -> Iterator[str]:
    """Yields the text of a file in blocks that end with a line, or between words if a line is longer than a block."""
    decode = codecs.getincrementaldecoder("utf-8-sig")().decode
    rest, at = "", 0
    try:
        with open_plain(path) as file:
            while data := file.read(BLOCK_BYTES):
                advance(len(data))
                text = rest + decode(data)
                cut = text.rfind("\n")
                if cut < 0 and len(text) > BLOCK_BYTES:
                    cut = text.rfind(" ")
                if cut >= 0:
                    yield text[:cut]
                rest = text[cut + 1 :]
                at += len(data)
            rest += decode(b"", True)
    except UnicodeDecodeError as error:
        raise EntriesError(
            f"{path}: expected UTF-8, found {error.object[error.start : error.end]!r} near byte {at + error.start:,}"
        ) from None
    except (EOFError, zlib.error, OSError) as error:
        raise EntriesError(f"{path}: cannot be read: {error}") from None
    yield rest


def _texts(files: Sequence[str], advance: Callable[[int], Any]) -> Iterator[pa.Array]:
    for path in files:
        for text in _blocks(path, advance):
            yield pa.array(text.split("\n"), pa.string())


def _captions(spec: PoolSpec, advance: Callable[[int], Any]) -> Iterator[pa.Array]:
    for split in pool.splits(spec):
        for batch in pool.read(spec, split, {}):
            captions = batch["caption"].filter(pc.is_null(batch["drop_reason"])).combine_chunks()
            advance(captions.nbytes)
            yield captions


def build(args: argparse.Namespace, progress: Progress) -> Entries:
    """The entries of all sources that the command line names. Raises EntriesError or PoolError."""
    wordnet = [] if args.wordnet is None else _wordnet_files(args.wordnet)
    sizes = {path: _size(path) for path in [*args.corpus, *args.titles, *wordnet]}
    spec = None
    if args.captions:
        spec = PoolSpec(path=args.captions, caption=args.caption_column, columns=[], captions="each")
        spec.url = spec.caption  # a pool must have a url, but a recipe may not use one column for both
        pool.columns(spec)
    entries = Entries()
    thresholds = {"min_count": args.min_count, "min_pmi": args.min_pmi}

    def bar(what: str, files: Sequence[str] = ()) -> Callable[[int], Any]:
        """Adds a progress bar. The total is unknown for compressed files and for a pool."""
        plain = files and all(plain_name(path) == path.lower() for path in files)
        task = progress.add_task(what, total=sum(sizes[path] for path in files) if plain else None)
        return lambda n: progress.advance(task, n)

    def listed(files: Sequence[str]) -> list[dict[str, Any]]:
        return [{"path": path, "bytes": sizes[path]} for path in files]

    if wordnet:
        entries.add(wordnet_entries(args.wordnet), source="wordnet", files=listed(wordnet))
    if args.corpus:
        size = sum(sizes[path] for path in args.corpus)
        texts = _texts(args.corpus, bar("corpus", args.corpus))
        found, words = corpus_entries(texts, size, args.min_count, args.min_pmi)
        entries.add(found, source="corpus", files=listed(args.corpus), words=words, **thresholds)
    if spec is not None:
        texts = _captions(spec, bar("captions"))
        found, words = corpus_entries(texts, pool.size(spec), args.min_count, args.min_pmi)
        stamps = [{"path": name, "bytes": bytes_} for name, bytes_, _ in pool.stamp(spec)]
        entries.add(found, source="captions", files=stamps, words=words, **thresholds)
    if args.titles:
        size = sum(sizes[path] for path in args.titles)
        found = title_entries(args.titles, size, args.min_views, bar("titles", args.titles))
        entries.add(found, source="titles", files=listed(args.titles), min_views=args.min_views)
    return entries


def _size(path: str) -> int:
    """Stored size of a file in bytes. Raises EntriesError if it does not exist."""
    try:
        fs, root = fsspec.core.url_to_fs(path)
        if fs.isfile(root):
            return int(fs.size(root))
    except (OSError, ValueError, ImportError) as error:
        raise EntriesError(f"{path}: cannot be read: {error}") from None
    raise EntriesError(f"{path}: no such file")


def _encoded(name: str, data: bytes) -> bytes:
    if name.endswith(".gz"):
        return gzip.compress(data, mtime=0)
    return pa.compress(data, "zstd", asbytes=True) if name.endswith(".zst") else data


@entry_point
def main(argv: Sequence[str] | None = None) -> None:
    """Runs the command. Writes nothing if a source or the command line is wrong."""
    parser = argparse.ArgumentParser(
        prog="python -m pipeline.entries",
        description=__doc__,
        epilog="exit status: 0 done; 2 a source or the command line is wrong",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("out", metavar="OUT", help="the table to write: .tsv, .tsv.gz or .tsv.zst; local or remote")
    parser.add_argument("--corpus", metavar="FILE", nargs="+", default=[], help="text in UTF-8")
    parser.add_argument("--captions", metavar="POOL", nargs="+", help="files, globs or folders of a pool")
    parser.add_argument("--caption-column", metavar="NAME", default="caption", help="default: %(default)s")
    parser.add_argument("--titles", metavar="FILE", nargs="+", default=[], help="lines of title, tab and views")
    parser.add_argument("--wordnet", metavar="FOLDER", help="the folder of WordNet's data files, often called dict")
    parser.add_argument(
        "--min-count", type=int, default=100, help="minimum count of a word or pair (default: %(default)s)"
    )
    parser.add_argument("--min-pmi", type=float, default=30.0, help="minimum ratio of a pair (default: %(default)s)")
    parser.add_argument("--min-views", type=int, default=70, help="minimum views of a title (default: %(default)s)")
    args = parser.parse_args(argv)
    if plain_name(args.out).rpartition(".")[2] != "tsv" or args.out.endswith(".bz2"):
        parser.error(f"OUT: expected a name in .tsv, .tsv.gz or .tsv.zst, found {args.out!r}")
    if not (args.corpus or args.captions or args.titles or args.wordnet):
        parser.error("expected a source: --corpus, --captions, --titles or --wordnet")
    for option in ("min_count", "min_pmi", "min_views"):
        if not getattr(args, option) > 0:
            parser.error(f"--{option.replace('_', '-')}: must be above 0, found {getattr(args, option)}")
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeElapsedColumn())
    try:
        with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
            entries = build(args, progress)
        if not entries.found:
            raise EntriesError("no source has an entry above the thresholds")
        folder, name = os.path.split(args.out)
        store = Store(folder or ".")
        store.write(name, _encoded(name, entries.table()))
        store.write(f"{name}.sources.json", json.dumps({"sources": entries.sources}, indent=1).encode())
    except (PoolError, OSError) as error:
        raise EntriesError(str(error).removeprefix("url: ")) from None  # the caption column also serves as the url
    for source in entries.sources:
        print(f"{source['source']}: {source['entries']:,} entries, {source['new']:,} of them new")
    print(f"{len(entries.found):,} entries in {args.out}")


if __name__ == "__main__":
    sys.exit(main())
