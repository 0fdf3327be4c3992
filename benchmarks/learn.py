"""Filters against noise of known kinds, and a learned mixture of scores against each single score.

    python benchmarks/learn.py [WORK] [--pictures 1400] [--labels 0.25] [--train SAMPLES] [--seeds 3] [--arms NAME …]

Builds the demo web in WORK, whose truth is known. Prints what each filter of `conf/demo.yaml` catches of its kind of
noise. Then measures all scores of the same web without cutting by any (copies are removed), labels a share of the rows
by the truth, fits the mixture of `pipeline.learn` to them, with and without embeddings, and compares it on the other
rows with each single score: AUC, and precision among the same number of kept rows, with 95% bootstrap intervals.

With `--train`, trains `conf/train_demo.yaml` on SAMPLES samples for each way of choosing rows and each seed, and
evaluates zero-shot on held-out scenes. All arms choose from the rows without labels. `none` takes all; `clean` those
that are good by the truth; the others as many as there are good ones. What is there already in WORK is not made again.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
import pyarrow.parquet as pq
import yaml

from pipeline import learn, open_run, score_mixture
from pipeline.card import About
from pipeline.demo import run as demo
from pipeline.demo import truth, web
from pipeline.hashing import uniform
from pipeline.stages.write_shards import WriteShards
from pipeline.storage import Store
from trainer.terminal import Console

SCORES = ["clip_score", "language_score", "original_width", "original_height", "original_bytes"]
VECTORS = ["image_embedding", "text_embedding"]
MIXTURES = {"mixture": SCORES, "mixture+vectors": [*SCORES, *VECTORS]}
SHARES = (0.3, 0.5)
STEPS = """
  - exact_dedup: {by: [url]}
  - language: {keep: null}
  - download:
      {image_size: 128, resize_mode: keep_ratio_largest, timeout: 4, retries: 1, allow_addrs: ["127.0.0.1:PORT"]}
  - exact_dedup: {by: [sha256]}
  - near_dedup: {max_hamming: 4}
  - clip_score: {model: pipeline/demo/scorer, batch_size: 64, embeddings: true}
  - write_shards: {samples_per_shard: 500}
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", nargs="?", type=Path, default=Path("runs/learn"))
    parser.add_argument("--pictures", type=int, default=1400)
    parser.add_argument("--labels", type=float, default=0.25, help="share of the rows to label")
    parser.add_argument("--train", type=int, metavar="SAMPLES", help="train each arm on so many samples")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--arms", nargs="+", help="train these arms only")
    args = parser.parse_args()
    curate(args.work, args.pictures)
    truth.show(truth.judge(*truth.read(args.work / "filtered", args.work / "web")), Console())
    rows = compare(args.work, args.labels)
    if args.train:
        train(args.work, rows, args.train, args.seeds, args.arms)


def curate(work: Path, pictures: int) -> None:
    """Runs the demo's recipe as `filtered`, and one without cuts as `measured`."""
    if (work / "measured" / "shards" / "_SUCCESS").exists():
        return
    with web.open_port(web.PORT) as server:
        web.build(work / "web", pictures, 0, server.server_port)
        steps = yaml.safe_load(STEPS.replace("PORT", str(server.server_port)))
        recipe = {"name": "measured", "pool": {"path": str(work / "web/pool.parquet")}, "steps": steps}
        (work / "measured.yaml").write_text(yaml.safe_dump(recipe, sort_keys=False))
        pool = f"pool.path={work}/web/pool.parquet"
        jobs = {
            "filtered": [*demo.recipe(server.server_port), pool],
            "measured": [str(work / "measured.yaml")],
        }
        with web.serving(server, work / "web"):
            for name, words in jobs.items():
                command = [sys.executable, "-m", "pipeline.run", *words, f"run={work / name}"]
                subprocess.run(command, check=True, stdout=sys.stderr)


def compare(work: Path, share: float) -> pa.Table:
    """Prints the comparison; returns the rows without labels: `uid, good`, and a column for each score."""
    run = open_run(work / "measured")
    good = {
        (row["url"], row["caption"]): row["good"] for row in pq.read_table(work / "web/truth/truth.parquet").to_pylist()
    }
    tables = list(run.scan(["uid", "url", "caption", *SCORES, *VECTORS], after="clip_score"))
    rows = pa.concat_tables(tables)
    pairs = zip(rows["url"].to_pylist(), rows["caption"].to_pylist())
    rows = rows.append_column("good", pa.array([good[pair] for pair in pairs]))
    labelled = pa.array(uniform(rows["uid"], purpose="labels") < share)
    chosen = rows.filter(labelled)
    labels = pa.table({"uid": chosen["uid"], "label": chosen["good"].cast(pa.uint8())})
    pyarrow.csv.write_csv(labels, work / "labels.csv")
    held = rows.filter(pc.invert(labelled))
    y = held["good"].to_numpy(zero_copy_only=False)
    scores: dict[str, np.ndarray] = {}
    target = learn.read_target("labels", work / "labels.csv")
    for name, columns in MIXTURES.items():
        sample = learn.draw(run, target, columns, "clip_score")
        findings = learn.fit(sample, columns, target.unlabelled)
        print(f"\n{name}:")
        learn.show(Console(), findings, sample, target, None, 0)
        scores[name] = findings.mixture.logits(held)
    for part in findings.parts:  # a single score is turned as the labels say
        if part.column in SCORES:
            values = score_mixture.scalars(held[part.column])
            scores[part.column] = np.where(np.isfinite(values), -values if part.falling else values, -np.inf)

    ones, even = np.ones(len(y)), float(y.mean())
    print(f"\n{len(chosen):,} rows labelled; on the {len(y):,} others, of which {y.mean():.1%} are good:")
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
    return pa.table({"uid": held["uid"], "good": held["good"], **scores})


def precision(ranking: score_mixture.Ranking, share: float) -> Callable[[np.ndarray], float]:
    return lambda weights: ranking.kept(weights, share)[0]


def train(work: Path, rows: pa.Table, samples: int, seeds: int, arms: list[str] | None) -> None:
    """Trains and evaluates the arms; prints their accuracy."""
    good = rows["good"].to_numpy(zero_copy_only=False)
    count = int(good.sum())
    chosen = {"none": np.ones(len(rows), bool), "random": _top(-uniform(rows["uid"], purpose="arm"), count)}
    chosen |= {name: _top(rows[name].to_numpy(), count) for name in rows.column_names[2:]}
    chosen["clean"] = good
    arms = arms or list(chosen)
    if not (work / "heldout").exists():
        demo.draw_heldout(work / "heldout", seed=1)
    tasks = [work / "heldout" / name.replace(" ", "_") for name in demo.TASKS]
    found: dict[str, list[list[float]]] = {name: [] for name in arms}
    for seed in range(seeds):
        for name in arms:
            _write(work, name, rows["uid"].filter(pa.array(chosen[name])))
            done = work / "arms" / name / f"accuracy-{samples}-{seed}.json"
            if not done.exists():
                done.write_text(json.dumps(_accuracy(work / "arms" / name, tasks, samples, seed)))
            found[name].append(json.loads(done.read_text()))
            print(f"{name}, seed {seed}: {found[name][-1]}", file=sys.stderr, flush=True)
    print(f"\nzero-shot accuracy after {samples:,} samples: mean of {seeds} seeds ± their standard deviation")
    print(f"{'rows chosen by':<16} {'rows':>6} {'good':>6}" + "".join(f"{task:>20}" for task in demo.TASKS))
    for name in arms:
        cells = []
        for values in zip(*found[name]):
            deviation = statistics.stdev(values) if len(values) > 1 else 0.0
            cells.append(f"{f'{statistics.mean(values):.3f} ± {deviation:.3f}':>20}")
        kept = chosen[name]
        print(f"{name:<16} {kept.sum():>6} {good[kept].mean():>6.1%}" + "".join(cells))
    means = " ".join(f"{name.replace('+', '_')}={np.mean(found[name]):.4f}" for name in arms)
    print(f"RESULT samples={samples} seeds={seeds} {means}")


def _top(scores: np.ndarray, count: int) -> np.ndarray:
    kept = np.zeros(len(scores), bool)
    kept[np.argsort(-scores, kind="stable")[:count]] = True
    return kept


def _write(work: Path, name: str, uids: pa.ChunkedArray) -> None:
    """Writes the shards of an arm."""
    folder = work / "arms" / name
    if (folder / "shards" / "_SUCCESS").exists():
        return
    run = open_run(work / "measured")
    types = {n: run.columns("clip_score")[n] for n in ("uid", "url", "caption", "image")}
    tables = run.scan(list(types), after="clip_score")
    table = pa.concat_tables([t.filter(pc.is_in(t["uid"], uids.combine_chunks())).select(list(types)) for t in tables])
    writer, store = WriteShards(samples_per_shard=500), Store(str(folder / "shards"))
    starts = range(0, len(table), writer.samples_per_shard)
    shards = [
        writer.write(store, i, iter([table.slice(start, writer.samples_per_shard)]), types)
        for i, start in enumerate(starts)
    ]
    writer.finish(store, About(name, types), shards)
    store.write("_SUCCESS", b"")


def _accuracy(arm: Path, tasks: list[Path], samples: int, seed: int) -> list[float]:
    """Top-1 of each task, 0 to 1."""
    out = arm / f"seed-{seed}"
    words = [f"shards={arm}", f"output={out}", f"samples={samples}", f"seed={seed}", "precision=fp32", "resume=none"]
    subprocess.run(
        [sys.executable, "-m", "trainer.train", "conf/train_demo.yaml", *words], check=True, stdout=sys.stderr
    )
    accuracies = []
    for task in tasks:
        words = ["--model", str(out / "model"), "--data", str(task), "--templates", f"{task}.txt"]
        command = [sys.executable, "-m", "trainer.evaluate", "zeroshot", *words]
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
        accuracies.append(float(json.loads(done.stdout)["metrics"]["acc1"]))
    return accuracies


if __name__ == "__main__":
    main()
