"""`python -m pipeline.run RECIPE.yaml [key=value …]`: from a table of URLs and captions to shards."""

from __future__ import annotations

import argparse
import dataclasses
import errno
import json
import os
import signal
import sys
import time
from collections.abc import Sequence
from typing import Any

import pyarrow as pa

from pipeline import pool, recipe
from pipeline.ledger import BooksError, Funnel
from pipeline.pool import PoolError
from pipeline.reader import RunError, describe, open_run
from pipeline.recipe import Recipe, RecipeError
from pipeline.scheduler.claim import Claim, InUseError, LostClaimError, hold
from pipeline.scheduler.lifetime import GOES_ON, Watch
from pipeline.scheduler.passes import Loan, MeasurePass, Pass, SinkPass, make_passes
from pipeline.schema import is_heavy
from pipeline.step import HaltError
from pipeline.storage import DamagedError, Store
from trainer.terminal import Console, guarded, masked, one_line

EPILOG = """\
examples:
  python -m pipeline.run conf/demo.yaml
  python -m pipeline.run conf/demo.yaml workers=1 steps.threshold.top_fraction=0.2
  python -m pipeline.run conf/400m.yaml --plan
  ray job submit --working-dir . -- python -m pipeline.run conf/400m.yaml

Run the same command again to resume an interrupted run. A changed filter or threshold is applied to the stored
measurements; a change that would discard downloads or scores is refused.

exit status: 0 success; 2 the recipe or the command line is wrong and nothing was started; 130 ended by Ctrl-C;
143 ended by SIGTERM; 1 any other failure
"""


@guarded()
def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m pipeline.run",
        description="Curates a pool of image URLs and captions into WebDataset shards, following a recipe.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("recipe", help="the recipe, a YAML file")
    parser.add_argument(
        "overrides", nargs="*", metavar="key=value", help="changes to the recipe, as in steps.download.timeout=5"
    )
    parser.add_argument("--plan", action="store_true", help="print what would run and what it would cost; run nothing")
    args = parser.parse_intermixed_args(argv)  # options may stand between the overrides
    console, errors = Console(), Console(stderr=True)
    watch = Watch()
    checked: Recipe | None = None
    try:
        if args.plan:
            from pipeline.plan import print_plan

            print_plan(console, recipe.load(args.recipe, args.overrides, _local_columns))
            return 0
        checked = recipe.load(args.recipe, args.overrides, pool.columns)
        return _run(console, checked, watch)
    except RecipeError as error:
        for problem in error.problems:
            errors.error(one_line(problem))
        return 2
    except (RefusedError, InUseError) as error:
        errors.error(error)
        return 2
    except KeyboardInterrupt:
        watch.leave()
    except Exception as error:
        if lost := watch.lost():
            watch.end(1, f"error: {lost}. {GOES_ON}")
            watch.leave()
        errors.error(_explain(error, checked.run if checked else args.recipe))
        if os.environ.get("WINNOW_DEBUG"):
            raise
        return 1
    finally:
        watch.close()


class RefusedError(Exception):
    """The command cannot use this run directory, the run to reuse, or this cluster. Nothing was computed."""


def _run(console: Console, checked: Recipe, watch: Watch) -> int:
    if Store(checked.run).local:
        # Each worker has its own working directory.
        checked.run = Store(checked.run).root
    if missing := Store(checked.run).missing_package():
        raise RecipeError([f"run: {missing}"])
    with hold(Store(checked.run)) as claim:
        return _curate(console, checked, claim, watch)


def _curate(console: Console, checked: Recipe, claim: Claim, watch: Watch) -> int:
    types = pool.columns(checked.pool)
    own = make_passes(checked, _pool_key(checked), types)
    passes = _adopt(checked, own)
    _claim(checked, own, describe(passes, checked))

    from pipeline.scheduler import cluster, executor
    from pipeline.scheduler.events import Events
    from pipeline.scheduler.progress import Progress, print_funnel

    for note in checked.notes():
        console.say(f"note: {note}")
    started = time.monotonic()
    events = Events(Store(checked.run))
    progress, done = Progress(console, events.watch), False
    events.command(checked.name, [p.label for p in passes])
    try:
        try:
            cluster.start_ray(checked.workers, console.say)
        except cluster.StartError as error:
            raise HaltError(str(error)) from None
        except SystemExit:  # Ray raises this on a SIGTERM while it starts
            watch.take_signals()
            signal.raise_signal(signal.SIGTERM)
        watch.take_signals()  # Ray has installed its own handlers
        watch.watch(cluster.cluster_parts())
        try:
            cluster.check_nodes(Store(checked.run), _files(checked))
        except cluster.UnseenError as error:
            raise RefusedError(str(error)) from None
        from pipeline.scheduler.metrics import Metrics

        progress.watchers.append(Metrics(checked.name).watch)
        job = executor.Job(checked, passes, types, progress, claim)
        outcome = executor.execute(job)
        dropped = executor.write_books(job, outcome)
        done = True
    except LostClaimError:
        events.close()  # the file now belongs to the other command
        raise
    except BaseException as error:
        progress.end(done)
        cause = "interrupted" if isinstance(error, KeyboardInterrupt) else _explain(error, checked.run)
        events.end(2 if isinstance(error, RefusedError) else 1, error=cause)
        raise
    finally:
        progress.end(done)
        ending = watch.is_ending()
        if not ending:
            watch.close()
        cluster.stop_ray(watch.take_signals, orderly=not ending)
    folder = _folder(passes)
    if folder:
        claim.check()
        Store(checked.run).write(f"{folder}/_SUCCESS", b"")
    for line in outcome.mended[:10]:
        console.say(f"repaired: {line}")
    if len(outcome.mended) > 10:
        console.say(f"repaired: {len(outcome.mended) - 10:,} more")
    if outcome.reused:
        measured = [p.label for p in passes if isinstance(p, MeasurePass) and p.label in outcome.reused]
        detail = f"; nothing was measured again by {' or '.join(measured)}" if measured else ""
        console.say(f"reused {', '.join(outcome.reused)}{detail}")
    for label, (rows, known) in outcome.known.items():
        if known:
            console.say(f"{label}: {known:,} of {rows:,} rows had been measured before")
    print_funnel(console, outcome.funnel)
    if checked.report:
        _report(console, checked.run)
    # A run without a sink produces measurements and drops, so it may keep no row.
    empty = not outcome.funnel.kept and folder and not checked.allow_empty
    if not outcome.funnel.kept:
        why = _why_empty(outcome.funnel)
        console.say(f"No row was kept: {why}")
    where = f"{folder} in {checked.run}/{folder}, " if folder else ""
    seconds = time.monotonic() - started
    console.say(f"{where}{dropped:,} drops with their reasons in {checked.run}/drops ({seconds:.0f} s)")
    if empty:
        cure = "If this is intended, add to the recipe: allow_empty: true"
        Console(stderr=True).error(f"no row was kept: {why}. {cure}")
    status = 1 if empty else 0
    events.end(status, rows_in=outcome.funnel.rows_in, kept=outcome.funnel.kept)
    return status


def _report(console: Console, path: str) -> None:
    """Writes the report. The run is done, so a failure is only a warning."""
    try:
        from pipeline.report import report

        written = report.write(open_run(path), path, console=console)
    except Exception as error:
        cause = f"{type(error).__name__}: {one_line(str(error))}"
        Console(stderr=True).say(f"warning: the report was not written: {cause}. Try again: winnow report {path}")
        return
    written.show(console)


def _why_empty(funnel: Funnel) -> str:
    """Names the step that dropped the last rows, and its reasons."""
    dropping = [(step, line) for step, line in funnel.lines.items() if line.dropped]
    if not dropping:
        return "the pool has no rows"
    step, line = dropping[-1]
    reasons = sorted(line.dropped.items(), key=lambda item: -item[1])
    counts = ", ".join(f"{reason} {n:,}" for reason, n in reasons[:3]) + (", …" if len(reasons) > 3 else "")
    return f"{step} dropped the last {sum(line.dropped.values()):,} of {funnel.rows_in:,} rows ({counts})"


def _local_columns(spec: recipe.PoolSpec) -> dict[str, pa.DataType] | None:
    """The columns of a local pool. None for a remote one, which a plan does not read."""
    return pool.columns(spec) if spec.is_local else None


def _pool_key(checked: Recipe) -> dict[str, Any]:
    spec = dataclasses.asdict(checked.pool)
    del spec["rows"], spec["path"]
    spec |= {"retry": True} if spec.pop("retry") else {}
    if spec["embeddings"] is None:  # keeps the key of runs that are older than this option
        del spec["embeddings"]
    return {"version": 2, "files": pool.stamp(checked.pool), "unit_rows": checked.unit_rows, **spec}


def _claim(checked: Recipe, passes: list[Pass], described: list[dict[str, Any]]) -> None:
    """Writes this recipe to `run.json`. Raises RefusedError if that would orphan expensive results.

    Filters and thresholds may change: their passes get new keys, and downloads and scores stay in use. `passes` are the
    passes of this directory; `described` is their description for `run.json`.
    """
    store = Store(checked.run)
    source = masked({**checked.source, "workers": None, "reuse": None, "report": None, "allow_empty": None})
    claim: dict[str, Any] = {"name": checked.name, "recipe": source, "passes": described}
    data = json.dumps(claim, indent=1, default=str).encode()
    ours = _is_ours(store, passes)
    if not store.exists("run.json") and not ours:
        # Files that no manifest names would be removed as leftovers.
        if taken := [name for name in (_folder(passes) or "shards", "drops") if store.names(name)]:
            raise RefusedError(
                f"{checked.run}/{taken[0]} holds files that do not belong to a run; choose another `run`"
            )
        if passes[0].complete() is not None:
            raise RefusedError(
                f"{checked.run}/run.json is missing, and the downloads or scores there belong to another recipe; "
                "restore it, or use the recipe of that run"
            )
    if store.create("run.json", data):
        return
    try:
        old = json.loads(store.read("run.json"))
        roots = [os.path.basename(p.root) for p in passes]
        measured = [os.path.basename(p["root"]) for p in old["passes"] if p["kind"] == "measure"]
        orphans = [root for root in measured if root not in roots and store.names(f"passes/{root}/commits")]
        same_pool = os.path.basename(old["passes"][0]["root"]) == roots[0]
        changed = differences(old["recipe"], source)
    except (ValueError, KeyError, TypeError, IndexError, AttributeError, RecursionError):
        if ours:
            store.write("run.json", data)
            return
        raise RefusedError(f"{checked.run}/run.json is not a run of Winnow; choose another `run`") from None
    if old["name"] == claim["name"] and same_pool and not orphans:
        store.write("run.json", data)
        return
    if not same_pool and not any(line.startswith("pool") for line in changed):
        changed.insert(0, "the files of the pool have changed since: their names, sizes or times")
    changed = changed or ["the files of a step have changed since"]
    cost = f"; {', '.join(orphans)} would have to be repeated" if orphans else ""
    lines = "\n".join(f"  {line}" for line in changed)
    raise RefusedError(
        f"{checked.run} holds the run of another recipe{cost}. Nothing was changed. The difference:\n{lines}\n"
        "Use the old recipe to continue it, or set another `run` (with `reuse: OLD_RUN` to reuse what is the same)."
    )


def _files(checked: Recipe) -> list[str]:
    """The first local file of the pool, and the files that the steps name."""
    pool_files = [file for file in pool.find_files(checked.pool) if "://" not in file]
    return [*pool_files[:1], *(file for step in checked.steps for file in step.files())]


def _folder(passes: list[Pass]) -> str | None:
    """The folder in the run that the sink writes to; None without a sink."""
    last = passes[-1]
    return last.sink.folder if isinstance(last, SinkPass) else None


def _is_ours(store: Store, passes: list[Pass]) -> bool:
    """Whether the passes in a directory without a readable run.json belong to this recipe."""
    if passes[0].complete() is None:
        return False
    roots = {os.path.basename(p.root): p for p in passes}
    strangers = [name for name in store.folders("passes") if name not in roots]
    return not strangers or all(
        store.names(f"passes/{root}/commits") for root, p in roots.items() if isinstance(p, MeasurePass)
    )


def _adopt(checked: Recipe, passes: list[Pass]) -> list[Pass]:
    """Replaces each pass that the run named by `reuse` has completed with that run's pass, and lets other measuring
    passes borrow its measurements of equal rows.

    Equal keys mean equal bytes. The pools may differ, for example because one grew. Then pixels and vectors of the pool
    itself are not compared, so measurements that depend on them are repeated.
    """
    if not checked.reuse:
        return passes
    store = Store(checked.reuse)
    try:
        lender = open_run(store.root).passes[0]
    except RunError as error:
        raise RefusedError(f"reuse: {error}") from None

    def adopted(mine: Pass) -> Pass:
        other = dataclasses.replace(mine, root=store.path(f"passes/{os.path.basename(mine.root)}"))
        if isinstance(mine, SinkPass):
            return mine
        if not isinstance(mine, MeasurePass) or not isinstance(other, MeasurePass):
            return other if mine.complete() is None and other.complete() is not None else mine
        types = {**lender.adds, **passes[0].adds}
        comparable = all(c in lender.adds and not is_heavy(types[c]) for c in mine.origins)
        lends = lender.key == passes[0].key or comparable
        return dataclasses.replace(other, root=mine.root, lender=Loan(lender, other) if lends else None)

    return [adopted(p) for p in passes]


def differences(old: Any, new: Any) -> list[str]:
    """The keys of two recipes that differ, as `steps.download.timeout: 10 → 5`."""
    before, after = dict(_flat(old)), dict(_flat(new))
    return [
        f"{key}: {before.get(key, '(not set)')} → {after.get(key, '(not set)')}"
        for key in {**before, **after}
        if before.get(key) != after.get(key)
    ]


def _flat(data: Any, prefix: str = "") -> list[tuple[str, Any]]:
    if prefix == "steps" and isinstance(data, list):
        lines = [recipe.split_line(line) for line in data]
        labels = recipe.labels([name for name, _ in lines])
        options = [pair for label, (_, o) in zip(labels, lines) for pair in _flat(o or {}, f"steps.{label}") if o]
        return [("steps", ", ".join(labels)), *options]
    if isinstance(data, dict) and data:
        return [pair for k, v in data.items() for pair in _flat(v, f"{prefix}.{k}" if prefix else str(k))]
    return [(prefix, data)]


def _explain(error: BaseException, where: str) -> str:
    """Explains an exception in one line: the root of its chain of causes, and the cure if there is one."""
    cause: BaseException = error
    while True:
        deeper = getattr(cause, "cause", None) or cause.__cause__
        if not isinstance(deeper, BaseException) or deeper is cause:
            break
        cause = deeper
    message = str(cause).strip() or type(cause).__name__
    if "Traceback (most recent call last)" in message:  # from Ray, for a worker that cannot import what it received
        message = f"{message.splitlines()[0]} … {message.splitlines()[-1]}"
    if getattr(cause, "errno", None) == errno.ENOSPC or "No space left on device" in str(error):
        return f"the disk of {where} is full; committed results are kept. Free space and run the same command again"
    if isinstance(cause, BooksError):
        return f"the books do not balance: {cause}"
    if isinstance(cause, HaltError | DamagedError | LostClaimError | PoolError):
        return message
    return f"{type(cause).__name__}: {message} (WINNOW_DEBUG=1 shows the traceback)"


if __name__ == "__main__":
    sys.exit(main())
