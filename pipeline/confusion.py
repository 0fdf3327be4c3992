"""Measures the language model on captions of known language: a confusion table.

    python -m pipeline.confusion sentences.parquet --caption text --truth language
    python -m pipeline.confusion captions.csv --caption caption --truth lang --min-score 0.5

The table is read like a pool: parquet, csv, tsv, jsonl or json, also compressed. For each true language, prints the
number of captions; recall, the share of them recognised as this language; precision, the share of the captions
recognised as this language that are in it; and the languages that its captions were mistaken for. With --min-score, a
caption counts as recognised only at that probability or above.
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from collections.abc import Sequence

import pyarrow.compute as pc
from rich.table import Table

from pipeline import pool
from pipeline.recipe import PoolSpec
from pipeline.stages.language import Language
from trainer.errors import InputError
from trainer.terminal import Console, entry_point

UNSURE = "unsure"
"""The language recorded for a caption below --min-score."""
MOST_SHOWN = 5
"""Wrong languages shown for each language, most frequent first."""


def confusion(spec: PoolSpec, truth: str, step: Language, min_score: float = 0.0) -> Counter[tuple[str, str]]:
    """Counts captions by true language (column `truth`) and most likely language, `unsure` if below `min_score`.

    Rows without a usable caption or a language are left out. Raises PoolError if the table cannot be read.
    """
    types = pool.columns(spec)
    step.setup()
    counts: Counter[tuple[str, str]] = Counter()
    for split in pool.splits(spec):
        for batch in pool.read(spec, split, types):
            batch = batch.filter(pc.and_(pc.is_null(batch["drop_reason"]), pc.is_valid(batch[truth])))
            found = step.process(batch.select(["caption"]))
            sure = pc.greater_equal(found["language_score"], min_score)
            taken = pc.if_else(sure, found["language"], UNSURE)
            counts.update(zip(batch[truth].to_pylist(), taken.to_pylist()))
    return counts


def _table(counts: Counter[tuple[str, str]]) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for title in ("language", "captions", "recall", "precision"):
        table.add_column(title, justify="left" if title == "language" else "right", no_wrap=True)
    table.add_column("taken for")
    for language in sorted({true for true, _ in counts}):
        taken = Counter({found: n for (true, found), n in counts.items() if true == language})
        rows, right = taken.total(), taken.pop(language, 0)
        named = sum(n for (_, found), n in counts.items() if found == language)
        mistakes = sorted(taken.items(), key=lambda pair: (-pair[1], pair[0]))[:MOST_SHOWN]
        others = ", ".join(f"{found} {n:,}" for found, n in mistakes)
        precision = f"{right / named:.1%}" if named else "-"
        table.add_row(language, f"{rows:,}", f"{right / rows:.1%}", precision, others)
    return table


@entry_point
def main(argv: Sequence[str] | None = None) -> None:
    """Runs the command."""
    parser = argparse.ArgumentParser(
        prog="python -m pipeline.confusion",
        description=__doc__,
        epilog="exit status: 0 done; 2 the table or the command line is wrong",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("table", help="a file, a glob or a folder")
    parser.add_argument("--caption", default="caption", help="column of captions (default: %(default)s)")
    parser.add_argument("--truth", default="language", help="column of true languages (default: %(default)s)")
    parser.add_argument("--min-score", type=float, default=0.0, help="0 to 1 (default: %(default)s)")
    parser.add_argument("--model", help="another fastText model than lid.176.ftz")
    args = parser.parse_args(argv)
    step = Language(keep=None, model=args.model)
    try:
        problems = [f"--model: {problem}" for _, problem in step.check()]
        if not 0 <= args.min_score <= 1:
            problems.append(f"--min-score: must be between 0 and 1, found {args.min_score}")
        if problems:
            raise ValueError("\n".join(problems))
        spec = PoolSpec(path=args.table, caption=args.caption, columns=[args.truth], types={args.truth: "text"})
        spec.url = spec.caption  # a pool must have a url, but a recipe may not use one column for both
        counts = confusion(spec, args.truth, step, args.min_score)
        if not counts:
            raise ValueError(f"{args.table}: no row has both {args.caption!r} and {args.truth!r}")
    except (ValueError, OSError) as error:
        raise InputError(str(error).removeprefix("url: ")) from None  # the caption column also serves as the url
    Console().print(_table(counts))
    right = sum(n for (true, found), n in counts.items() if true == found)
    print(f"{counts.total():,} captions, {right / counts.total():.2%} recognised")


if __name__ == "__main__":
    sys.exit(main())
