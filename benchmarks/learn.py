"""Measures what filters catch of known kinds of noise, and compares a learned mixture of scores with single scores.

    python benchmarks/learn.py [WORK] [--pictures 1400] [--labels 0.25] [--train SAMPLES] [--seeds 3] [--arms NAME …]
    python benchmarks/learn.py WORK --web FOLDER --model SCORER [--recipe key=value …] [--heldout DATA]

Builds the demo web in WORK, where the kind of each row is known. Prints what each filter of `conf/demo.yaml` catches of
its kind of noise. Then scores the same web without cutting by any score (copies are removed), labels a share of the
rows by the truth, fits the mixture of `pipeline.learn` to them, with and without embeddings, and compares it with each
single score on the unlabelled rows: by AUC, and by precision at the same number of kept rows, with 95% bootstrap
intervals.

With `--train`, trains `conf/train_demo.yaml` on SAMPLES samples for each arm (a way of choosing rows) and each seed.
All arms choose among the unlabelled rows. `none` takes all of them, `clean` the good ones, and each other arm as many
as there are good ones. Scores that choose the same rows share an arm. The metric is the zero-shot top-1 accuracy for
the colours of held-out scenes. Arms are compared as in a study (`pipeline.study.statistics`). Results that WORK already
holds are reused.

`--web` uses another web than the demo's. FOLDER has `truth.parquet` with the columns `url`, `caption`, `kind` and `of`
(the name of the picture that a row shows). The site must be served at these URLs, on loopback. Rows whose kind is in
`--good` are good; the first of these kinds holds the originals, which the kinds of `--copies` repeat. Rows that repeat
both URL and caption are left out. The metric is then the AUC with which a caption finds its picture in `--heldout`,
captioned pictures as for `trainer.evaluate retrieval`. The pool has the truth in a column `good`, which no step reads,
so that a study of `WORK/measured` can cut by it.
"""

from __future__ import annotations

import argparse
import contextlib
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
import pyarrow.parquet as pq
import yaml

from pipeline import open_run
from pipeline.demo import run as demo
from pipeline.demo import truth, web
from pipeline.learn import training_rows
from pipeline.learn.__main__ import show
from pipeline.learn.fit import fit
from pipeline.models import score_mixture
from pipeline.study.arms import Arm, Trainer, index_pictures, write_subset
from pipeline.study.candidates import open_candidates
from pipeline.study.statistics import compare as compare_arms
from pipeline.study.statistics import interval, noise_of
from pipeline.study.study_plan import Training
from pipeline.text.hashing import uniform
from trainer.config import load_config
from trainer.terminal import Console

SCORES = ["clip_score", "language_score", "original_width", "original_height", "original_bytes"]
VECTORS = ["image_embedding", "text_embedding"]
MIXTURES = {"mixture": SCORES, "mixture+vectors": [*SCORES, *VECTORS]}
ARMS = ["none", "clean", *MIXTURES, *SCORES, "random"]
SHARES = (0.3, 0.5)
CONFIG = "conf/train_demo.yaml"
STEPS = """
  - exact_dedup: {by: [url]}
  - language: {keep: null}
  - download:
      {image_size: 128, resize_mode: keep_ratio_largest, timeout: 4, retries: 1, allow_addrs: [ADDRESS]}
  - exact_dedup: {by: [sha256]}
  - near_dedup: {max_hamming: 4}
  - clip_score: {model: MODEL, batch_size: 64, embeddings: true}
  - write_shards: {samples_per_shard: 500}
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", nargs="?", type=Path, default=Path("runs/learn"))
    parser.add_argument("--pictures", type=int, default=1400)
    parser.add_argument("--labels", type=float, default=0.25, help="share of the rows to label")
    parser.add_argument("--train", type=int, metavar="SAMPLES", help="train each arm on this many samples")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--workers", type=int, default=1, help="models trained at a time")
    parser.add_argument("--arms", nargs="+", choices=ARMS, help="train these arms only")
    parser.add_argument("--web", type=Path, metavar="FOLDER", help="use this web, already served, not the demo's")
    parser.add_argument("--good", nargs="+", default=["clean", "flaky", "moved"], metavar="KIND")
    parser.add_argument("--copies", nargs="+", default=["same_url", "exact_copy", "near_copy"], metavar="KIND")
    parser.add_argument("--model", default="pipeline/demo/scorer", help="model of clip_score (%(default)s)")
    parser.add_argument("--recipe", nargs="+", default=[], metavar="key=value", help="changes to conf/demo.yaml")
    parser.add_argument("--heldout", metavar="DATA", help="captioned pictures for retrieval, with --web")
    args = parser.parse_args()
    if args.web and args.train and not args.heldout:
        parser.error("--train with --web needs --heldout")
    curate(args)
    truth.show(truth.judge(*truth.read(args.work / "filtered", args.work / "web")), Console())
    rows = compare(args.work, args.labels)
    if args.train:
        train(args, rows)


def curate(args: argparse.Namespace) -> None:
    """Runs the demo's recipe in `WORK/filtered`, and a recipe without cuts by score in `WORK/measured`."""
    work = args.work
    if (work / "measured" / "shards" / "_SUCCESS").exists():
        return
    with served(args) as address:
        steps = yaml.safe_load(STEPS.replace("ADDRESS", f'"{address}"').replace("MODEL", args.model))
        recipe = {"name": "measured", "pool": {"path": str(work / "web/pool.parquet")}, "steps": steps}
        (work / "measured.yaml").write_text(yaml.safe_dump(recipe, sort_keys=False))
        overrides = [f"pool.path={work}/web/pool.parquet", f"steps.clip_score.model={args.model}", *args.recipe]
        jobs = {
            "filtered": [*demo.recipe(urlsplit(f"//{address}").port or web.PORT), *overrides],
            "measured": [str(work / "measured.yaml")],
        }
        for name, words in jobs.items():
            command = [sys.executable, "-m", "pipeline.run", *words, f"run={work / name}"]
            subprocess.run(command, check=True, stdout=sys.stderr)


@contextlib.contextmanager
def served(args: argparse.Namespace) -> Iterator[str]:
    """Writes pool and truth to `WORK/web`, and yields the address at which the web is served."""
    folder = args.work / "web"
    if args.web:
        yield adopt(args.web, folder, args.good, args.copies)
        return
    with web.open_port(web.PORT) as server:
        if not (folder / "pool.parquet").exists():  # `build` writes this file last
            web.build(folder, args.pictures, 0, server.server_port)
        with web.serving(server, folder):
            yield f"127.0.0.1:{server.server_port}"


def adopt(source: Path, folder: Path, good: list[str], copies: list[str]) -> str:
    """Writes pool and truth of another web in the format of the demo's, and returns its address."""
    rows: dict[tuple[str, str], dict[str, Any]] = {}
    for row in pq.read_table(source / "truth.parquet").to_pylist():
        if (pair := (row["url"], row["caption"])) not in rows or row["kind"] in good:
            rows[pair] = row
    pictures: dict[str, int] = {}
    for number, row in enumerate(rows.values()):
        shown = row["of"] if row["kind"] in (good[0], *copies) else f"row {number}"
        row["picture"] = pictures.setdefault(shown, len(pictures))
        row["good"] = row["kind"] in good
    table = pa.Table.from_pylist(list(rows.values())).select(["url", "caption", "kind", "good", "picture"])
    if not (folder / "pool.parquet").exists():  # a resumed run refuses a pool that was rewritten
        (folder / "truth").mkdir(parents=True, exist_ok=True)
        pq.write_table(table, folder / "truth" / "truth.parquet")
        pool = table.select(["url", "caption"]).append_column("good", table["good"].cast(pa.int64()))
        pq.write_table(pool, folder / "pool.parquet")
    addresses = {urlsplit(url).netloc for url, _ in rows}
    if len(addresses) > 1:
        raise SystemExit(f"{source}/truth.parquet: {len(addresses)} addresses, expected a web on one")
    return addresses.pop()


def compare(work: Path, share: float) -> pa.Table:
    """Prints the comparison and returns the unlabelled rows, with the columns `uid`, `place`, `good` and each score.

    `place` is the position among all rows.
    """
    run = open_run(work / "measured")
    known = pq.read_table(work / "web/truth/truth.parquet").to_pylist()
    tables = list(run.scan(["uid", "url", "caption", *SCORES, *VECTORS], after="clip_score"))
    rows = pa.concat_tables(tables)
    pairs = list(zip(rows["url"].to_pylist(), rows["caption"].to_pylist()))
    rows = rows.append_column("good", pa.array(truth.good_candidates(known, pairs)))
    rows = rows.append_column("place", pa.array(range(len(rows)), pa.int64()))
    labelled = pa.array(uniform(rows["uid"], purpose="labels") < share)
    chosen = rows.filter(labelled)
    labels = pa.table({"uid": chosen["uid"], "label": chosen["good"].cast(pa.uint8())})
    pyarrow.csv.write_csv(labels, work / "labels.csv")
    held = rows.filter(pc.invert(labelled))
    y = held["good"].to_numpy(zero_copy_only=False)
    scores: dict[str, np.ndarray] = {}
    target = training_rows.read_target("labels", work / "labels.csv")
    for name, columns in MIXTURES.items():
        sample = training_rows.draw(run, target, columns, "clip_score")
        findings = fit(sample, columns, target.unlabelled)
        print(f"\n{name}:")
        show(Console(), findings, sample, target, None, 0)
        scores[name] = findings.mixture.logits(held)
    for part in findings.parts:  # a score that falls as the label rises is negated
        if part.column in SCORES:
            values = score_mixture.scalars(held[part.column])
            scores[part.column] = np.where(np.isfinite(values), -values if part.falling else values, -np.inf)

    ones, even = np.ones(len(y)), float(y.mean())
    print(f"\n{len(chosen):,} rows labelled; results on the other {len(y):,}, {y.mean():.1%} of them good:")
    cuts = (*SHARES, even)
    print(f"{'score':<16} {'AUC':>22}" + "".join(f"{f'precision at {cut:.0%}':>24}" for cut in cuts))
    for name, values in scores.items():
        ranking = score_mixture.Ranking(values, y)
        figures = [score_mixture.bootstrap(ranking.auc, ones, 0)]
        figures += [score_mixture.bootstrap(precision(ranking, cut), ones, 0) for cut in cuts]
        print(f"{name:<16} {figures[0]!s:>22}" + "".join(f"{figure!s:>24}" for figure in figures[1:]))
    best = max(SCORES, key=lambda name: score_mixture.Ranking(scores[name], y).auc(ones))
    mixed, single = (score_mixture.Ranking(scores[name], y) for name in ("mixture", best))
    gain = score_mixture.bootstrap(lambda w: mixed.auc(w) - single.auc(w), ones, 0)
    more = score_mixture.bootstrap(lambda w: mixed.kept(w, even)[0] - single.kept(w, even)[0], ones, 0)
    print(f"mixture above {best}: AUC {gain}, precision at {even:.0%} {more}")
    print(
        f"RESULT auc_mixture={mixed.auc(ones):.4f} auc_best_single={single.auc(ones):.4f} "
        f"auc_gain_low={gain.low:.4f} precision_gain={more.value:.4f} precision_gain_low={more.low:.4f}"
    )
    return pa.table({name: held[name] for name in ("uid", "place", "good")} | scores)


def precision(ranking: score_mixture.Ranking, share: float) -> Callable[[np.ndarray], float]:
    return lambda weights: ranking.kept(weights, share)[0]


def train(args: argparse.Namespace, rows: pa.Table) -> None:
    """Trains and evaluates the arms. Prints their means and their differences from `none` and `random`."""
    good = rows["good"].to_numpy(zero_copy_only=False)
    count = int(good.sum())
    fixed = {"none": np.ones(len(rows), bool), "clean": good}
    fixed |= {name: _top(rows[name].to_numpy(), count) for name in rows.column_names[3:]}
    names = args.arms or [*fixed, "random"]

    def chosen(name: str, seed: int) -> np.ndarray:
        return fixed[name] if name in fixed else _top(uniform(rows["uid"], seed=seed, purpose="arm"), count)

    task, metric = retrieval(args.heldout) if args.web else zeroshot(args.work / "heldout")
    training = Training(CONFIG, [task], metric, tuple(range(args.seeds)), workers=args.workers)
    out = args.work / "training"
    candidates = open_candidates(open_run(args.work / "measured"), "clip_score", [], out / "candidates")
    numbers = index_pictures(candidates, out / "pictures")
    trainer = Trainer(training, load_config(CONFIG, ["shards=study", "output=study"]), out / "pictures", out)
    places = rows["place"].to_numpy()
    names_of: dict[tuple[Arm, ...], list[str]] = {}  # scores that choose the same rows share their arms
    for name in names:
        subsets = [write_subset(places[chosen(name, seed)], numbers, out / "subsets") for seed in training.seeds]
        arms = tuple(trainer.arm(*subset, args.train, seed) for subset, seed in zip(subsets, training.seeds))
        names_of.setdefault(arms, []).append(name)
    labels = {arm: ", ".join(same) for arms, same in names_of.items() for arm in arms}
    trainer.train(
        [arms[place] for place in range(args.seeds) for arms in names_of],
        lambda arm, record: print(
            f"{labels[arm]}, seed {arm.seed}: {record['metrics'][metric]:.4f} ({record['seconds']:.0f} s)",
            file=sys.stderr,
            flush=True,
        ),
    )
    values = {
        same[0]: np.array([trainer.result(arm)["metrics"][metric] for arm in arms])  # type: ignore[index]
        for arms, same in names_of.items()
    }
    noise = noise_of(np.stack(list(values.values())))
    families = {  # one for each baseline, as in a study
        other: compare_arms(values, [(name, other) for name in values if name not in ("none", other)], noise)
        for other in ("none", "random")
        if other in values and set(values) - {"none", other}
    }
    comparisons = {(c.first, c.second): c for family in families.values() for c in family.comparisons}
    print(
        f"\n{metric} after {args.train:,} samples, {args.seeds} seeds: mean with its 95% t interval, and differences "
        f"with intervals that hold jointly within a column"
    )
    print(f"{'rows chosen by':<16} {'rows':>6} {'good':>6} {'mean':>22}{'above none':>26}{'above random':>26}")
    for arms, (name, *others) in names_of.items():
        mean, share = interval(values[name]), np.mean([good[chosen(name, seed)].mean() for seed in training.seeds])
        cells = [f"{mean.mean:.3f} [{mean.low:.3f}, {mean.high:.3f}]".rjust(22)]
        for other in ("none", "random"):
            c = comparisons.get((name, other))
            cells.append(f"{c.difference:+.3f} [{c.low:+.3f}, {c.high:+.3f}]".rjust(26) if c else " " * 26)
        print(f"{name:<16} {arms[0].samples:>6} {share:>6.1%} {''.join(cells)}".rstrip())
        for same in others:
            print(f"{same:<16} the same rows")
    print(f"noise of one training {noise.sd:.4f}; F test of all arms p = {noise.p_arms:.3g}")
    for other, family in families.items():
        gain = max(family.comparisons, key=lambda c: c.difference)
        need = family.seeds_for(gain.difference) if gain.difference > 0 else None
        print(
            f"above {other}: a true difference of {family.detectable:.3f} is detected with 80% power; the largest, "
            f"{gain.difference:+.3f} of {gain.first}, needs {need or 'an unknown number of'} seeds"
        )
    means = " ".join(f"{name.replace('+', '_')}={value.mean():.4f}" for name, value in values.items())
    print(f"RESULT samples={args.train} seeds={args.seeds} {means}")


def zeroshot(folder: Path) -> tuple[dict[str, Any], str]:
    """Returns the task and the metric of the demo web: to name the colour in held-out scenes."""
    if not folder.exists():
        demo.draw_heldout(folder, seed=1)
    options = {"data": str(folder / "colour"), "templates": str(folder / "colour.txt"), "name": "colour"}
    return {"zeroshot": options}, "colour/acc1"


def retrieval(data: str) -> tuple[dict[str, Any], str]:
    """Returns the task and the metric of another web: whether a caption is nearer to its picture than to others."""
    return {"retrieval": {"data": data, "name": "heldout"}}, "heldout/image_retrieval_auc"


def _top(scores: np.ndarray, count: int) -> np.ndarray:
    kept = np.zeros(len(scores), bool)
    kept[np.argsort(-scores, kind="stable")[:count]] = True
    return kept


if __name__ == "__main__":
    main()
