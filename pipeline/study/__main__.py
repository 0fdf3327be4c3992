"""Studies where to cut a finished run: what each cut would keep, and which one trains the better model.

    python -m pipeline.study STUDY.yaml [key=value ...]

For example, after `winnow demo`, count first, then train:

    winnow study conf/study.yaml train=null
    winnow study conf/study.yaml train.seeds=5

A study reads the stored columns of the run, writes nothing into it, and needs neither network nor GPU. To resume a
stopped study, run the same command again; further cuts, budgets or seeds add to the results already there. It writes
`index.html`, `table.parquet`, `table.csv` and `overlap.parquet` to OUT, and `arms.parquet` if there is a `train` block.
docs/study.md describes the keys.
"""

from __future__ import annotations

import argparse
import fcntl
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from pipeline.study.study_plan import StudyError, load
from trainer.terminal import Console, entry_point, interrupted


@contextmanager
def claimed(out: Path) -> Iterator[None]:
    """Locks the folder of a study. Raises StudyError if another command has locked it, or if it is not a folder."""
    try:
        out.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        raise StudyError(f"out: found {out}, which is or lies in a file; expected a folder") from None
    with (out / ".lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise StudyError(f"out: {out} is in use by another study; wait for it, or name another folder") from None
        yield


@entry_point
def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m pipeline.study",
        description=__doc__,
        epilog="exit status: 0 done; 1 a training failed, or a file of the run is damaged; 2 the study is wrong",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("study", help="a YAML file such as conf/study.yaml")
    parser.add_argument("overrides", nargs="*", default=[], metavar="key=value", help="replaces a value of the file")
    args = parser.parse_args(argv)
    errors = Console(stderr=True)
    plan = load(args.study, args.overrides)
    # Imported here because numpy and pyarrow take time, and --help does not need them.
    from pipeline.study import outputs, study

    try:
        with claimed(Path(plan.out)):
            outputs.show(study.run(plan, errors), Path(plan.out))
    except KeyboardInterrupt as stop:
        errors.say("stopped; run the same command to resume")
        return interrupted(stop)
    return 0


if __name__ == "__main__":
    sys.exit(main())
