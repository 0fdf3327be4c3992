"""Writes the report of a finished run: one HTML page that opens from disk or an object store, without network.

    python -m pipeline.report runs/demo          writes runs/demo/report/index.html
    python -m pipeline.report s3://bucket/run --out report.html

The page shows the funnel; for each step, the distribution of what it measured, its cut, and pictures from both sides of
the cut; how well the scorer separates matching captions from others; failed downloads; hosts; languages; groups of
duplicates; concepts; picture sizes; scores against each other; timings; and the recipe.

Distributions and counts cover all rows. Pictures come from eight evenly spaced units, so the same run always gives the
same page. Memory use does not grow with the run beyond a few million rows.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from pipeline.reader import open_run
from pipeline.report.report import write
from trainer.terminal import Console, entry_point


@entry_point
def main(argv: Sequence[str] | None = None) -> None:
    """Runs the command."""
    parser = argparse.ArgumentParser(
        prog="python -m pipeline.report", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", help="the folder or address of a finished run")
    parser.add_argument("--out", help="file to write instead of RUN/report/index.html")
    args = parser.parse_args(argv)
    console = Console()
    write(open_run(args.run), args.run, args.out, console).show(console)


if __name__ == "__main__":
    sys.exit(main())
