"""Rebuilds the demo's scorer: a dual encoder that `trainer.train` trains on clean scenes.

    python -m pipeline.demo.scorer [WORK]

Draws 24,000 scenes from seeds not used by the demo web and trains `conf/train_demo_scorer.yaml` on them in WORK
(default `runs/demo-scorer`; resumes an interrupted training). Writes fp16 weights to `pipeline/demo/scorer/`, for
`clip_score: {model: pipeline/demo/scorer}`. Then prints how well the scorer separates true captions from wrong ones.
"""

from __future__ import annotations

import os
import random
import subprocess
import sys
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import pyarrow as pa

from pipeline.dataset.card import About
from pipeline.demo import captions
from pipeline.demo.scenes import Scene, draw, random_scene
from pipeline.demo.web import jpeg
from pipeline.stages.write_shards import WriteShards
from pipeline.storage import Store

HERE = Path(__file__).with_name("scorer")
CONF = Path("conf/train_demo_scorer.yaml")
SCENES, SEED = 24_000, 1_000_003
MAX_BYTES = 8_000_000


def _small(scene: Scene) -> bytes:
    """The scene as the demo's recipe stores it: a JPEG with a longer side of 128 pixels."""
    picture = draw(scene)
    picture.thumbnail((128, 128))
    return jpeg(picture)


def make_shards(folder: Path) -> None:
    """Writes clean scenes with true captions as shards."""
    rng = random.Random(SEED)
    writer = WriteShards(samples_per_shard=4000)
    store = Store(str(folder))
    types = {"uid": pa.string(), "url": pa.string(), "caption": pa.string(), "image": pa.binary()}
    shards = []
    with ProcessPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        for shard, start in enumerate(range(0, SCENES, writer.samples_per_shard)):
            scenes = [random_scene(rng) for _ in range(min(writer.samples_per_shard, SCENES - start))]
            table = pa.table(
                {
                    "uid": [f"{start + i:032x}" for i in range(len(scenes))],
                    "url": [f"scene:{scene.seed:012x}" for scene in scenes],
                    "caption": [captions.english(scene, rng) for scene in scenes],
                    "image": list(pool.map(_small, scenes, chunksize=64)),
                },
                schema=pa.schema(types),
            )
            shards.append(writer.write(store, shard, iter([table]), types))
    writer.finish(store, About("demo-scorer", types), shards)
    store.write("_SUCCESS", b"")


def separation(model: Path, pairs: int = 1000, seed: int = 7) -> float:
    """Area under the ROC curve of the CLIP score for true against mismatched captions, on unseen scenes."""
    import torch

    from trainer.model import encode_text, load

    net, preprocess, tokenizer = load(str(model))
    rng = random.Random(seed)
    scenes = [random_scene(rng) for _ in range(pairs)]
    wrong = [scene.mismatch(scenes, rng) for scene in scenes]
    with torch.inference_mode():
        image = net.encode_image(preprocess([draw(scene) for scene in scenes]), normalize=True)
        scores = [
            (image * encode_text(net, tokenizer([captions.english(s, rng) for s in described]), normalize=True)).sum(1)
            for described in (scenes, wrong)
        ]
    true, false = (score.numpy() for score in scores)
    return float(np.mean(true[:, None] > false[None, :]))


def main() -> None:
    if len(sys.argv) > 2 or sys.argv[1:2] in (["-h"], ["--help"]):
        raise SystemExit(__doc__)
    work = Path(sys.argv[1] if len(sys.argv) == 2 else "runs/demo-scorer")
    if not (work / "shards" / "_SUCCESS").exists():
        print(f"drawing {SCENES} scenes into {work}/shards", flush=True)
        make_shards(work / "shards")
    for words in (
        ["trainer.train", str(CONF), f"shards={work}/shards", f"output={work}"],
        ["trainer.export", str(work), str(HERE), "--precision", "fp16"],
    ):
        subprocess.run([sys.executable, "-m", *words], check=True)
    size = sum(file.stat().st_size for file in HERE.iterdir())
    print(f"{HERE}: {size:,} bytes, AUC {separation(HERE):.4f}")
    if size > MAX_BYTES:
        raise SystemExit(f"{HERE}: larger than {MAX_BYTES:,} bytes; use a smaller model in {CONF}")


if __name__ == "__main__":
    main()
