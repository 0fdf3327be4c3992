"""Gathers the sections of a run's report and writes its page."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import yaml

from pipeline import page
from pipeline.page import Thumbnails
from pipeline.reader import Run, RunError
from pipeline.report import fitness, sections
from pipeline.report.histogram import Tally
from pipeline.storage import Store
from trainer import atomic
from trainer.terminal import Console

PICTURE_UNITS = 8
"""Units that pictures are taken from. Few, because reading one picture checks its unit's whole file."""


class Written(NamedTuple):
    """A report that was written."""

    where: str
    verdicts: list[str]
    """A line about each scorer whose embeddings are stored."""

    def show(self, console: Console) -> None:
        for line in [*self.verdicts, f"report: {self.where}"]:
            console.say(line)


def write(run: Run, path: str, out: str | None = None, console: Console | None = None) -> Written:
    """Writes the report of a run at `path`, to `path/report/index.html` unless `out` is given.

    Raises RunError for a run that is not finished or whose passes were removed.
    """
    if not run.finished:
        raise RunError(f"{path} is not finished; give the command of the run again, then report on it")
    fits = fitness.measure(run)
    body = page.render("report.html", **gather(run, fits, console))
    verdicts = [f"{found.score} {found.fits[0]}" for found in fits]
    if out is None:
        store = Store(path)
        store.write("report/index.html", body)
        return Written(store.path("report/index.html"), verdicts)
    with atomic.replacing(out) as file:
        file.write(body)
    return Written(out, verdicts)


def gather(run: Run, fits: Sequence[fitness.Fitness], console: Console | None = None) -> dict[str, object]:
    """The values of the template `report.html`."""
    from rich.progress import track

    steps = [step for step in run.steps if step.label in run.funnel.lines]
    say = console or Console(quiet=True)
    picture_units = set(run.spread_units(PICTURE_UNITS))
    thumbnails = Thumbnails()
    judged = []
    hosts, lost = Tally(sections.MOST_HOSTS), Tally(sections.MOST_HOSTS)
    pictured = "image" in run.columns()
    for step in track(steps, "report", console=say, transient=True, disable=not say.is_terminal):
        line = run.funnel.lines[step.label]
        if line.dropped:
            judged.append(sections.judge(run, step, line, picture_units, lost))
    for table in run.scan("url", after=steps[0].label):
        hosts.add(sections.url_hosts(table["url"]))
    return {
        "run": run,
        "facts": sections.facts(run),
        "fits": [sections.scorer(found) for found in fits],
        "funnel": sections.funnel(run),
        "judged": [sections.shown_step(run, step, thumbnails, pictured) for step in judged],
        "failures": sections.failures(run),
        "hosts": sections.hosts(hosts, lost),
        "languages": sections.languages(run),
        "duplicates": list(sections.duplicates(run, picture_units, thumbnails)),
        "concepts": list(sections.concepts(run)),
        "sizes": sections.sizes(run),
        "scores": sections.scores(run),
        "timings": sections.timings(run),
        "recipe": yaml.safe_dump(
            {key: value for key, value in run.recipe.items() if value is not None},
            sort_keys=False,
            allow_unicode=True,
            width=100,
        ),
        "versions": sections.versions(),
    }
