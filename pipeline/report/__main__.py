"""Writes the report of a finished run: one HTML page that opens from disk or an object store, without network.

    python -m pipeline.report runs/demo          writes runs/demo/report/index.html
    python -m pipeline.report s3://bucket/run --out report.html

The funnel; for each step what it measured, with the cut drawn in, and pictures from both sides of it; failed downloads;
hosts; languages; groups of duplicates; sizes; scores against each other; whether the scorer is fit at all; timings; and
the recipe.

Everything is read through the read API. Distributions and counts are of all rows, pictures of eight units,
spread evenly, so the same run gives the same page. Memory does not grow with the run beyond some million rows.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from pipeline.reader import RunError, open_run
from pipeline.report.report import write
from pipeline.storage import DamagedError
from trainer.terminal import Console, guarded


@guarded()
def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m pipeline.report", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", help="the folder or address of a finished run")
    parser.add_argument("--out", help="file to write instead of RUN/report/index.html")
    args = parser.parse_args(argv)
    console, errors = Console(), Console(stderr=True)
    try:
        run = open_run(args.run)
        written = write(run, args.run, args.out, console)
    except RunError as error:
        errors.error(error)
        return 2
    except (DamagedError, OSError) as error:
        errors.error(error)
        return 1
    written.show(console)
    return 0


if __name__ == "__main__":
    sys.exit(main())
