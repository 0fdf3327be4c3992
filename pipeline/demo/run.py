"""The demo: builds and serves a small web, curates it, trains a model on the result, and measures both.

    winnow demo                      in any folder; in a checkout also `make demo`
    winnow demo --pictures 400       a smaller web, in less time

Needs no data, GPU or network. Prints the commands that it runs, so that you can run them yourself. Writes the web and
its ground truth to `runs/demo-web/`, the run to `runs/demo/` and the model to `runs/demo/model/`; an earlier demo there
is replaced.
"""

from __future__ import annotations

import argparse
import json
import random
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

from rich.table import Table

from pipeline import init
from pipeline.demo import truth, web
from pipeline.demo.scenes import COLOURS, SHAPES, class_scene
from trainer.terminal import Console, guarded

WEB, RUN, HELDOUT = Path("runs/demo-web"), Path("runs/demo"), Path("runs/demo-heldout")
PICTURES, SEED = 1400, 0
# By task: the attributes of a scene that name its class, and the prompts, which average over the other attributes.
TASKS = {
    "colour": (("colour",), [f"this is a picture of a {{c}} {shape}" for shape in SHAPES]),
    "shape": (("shape",), [f"this is a picture of a {colour} {{c}}" for colour in COLOURS]),
    "colour and shape": (("colour", "shape"), ["this is a picture of a {c}"]),
}
PER_CONCEPT = 4


def recipe(port: int) -> list[str]:
    """Arguments of `pipeline.run` for the demo: the shipped recipe, with overrides where it does not fit as it is.

    The recipe's paths are relative to a checkout. Elsewhere, the overrides name the package's scorer and entries.
    """
    path = init.recipes()["demo"]
    words = [_shown(path)]
    if path != Path.cwd() / "conf" / path.name:
        data = init.PACKAGE / "demo"
        words += [f"steps.clip_score.model={data / 'scorer'}", f"steps.balance.entries={data / 'entries.json'}"]
    if port != web.PORT:
        words.append(f'steps.download.allow_addrs=["127.0.0.1:{port}"]')
    return words


def _shown(path: Path) -> str:
    """The path, relative to the current folder if it lies in it."""
    return str(path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path)


def draw_heldout(folder: Path, seed: int) -> dict[str, Path]:
    """Draws PER_CONCEPT scenes of each colour and shape that are neither in the web nor in the scorer's data.

    Returns a folder for each task. It holds a folder of pictures per class; a file of prompts lies beside it.
    """
    rng = random.Random(seed)
    scenes = [class_scene(colour, shape, rng) for colour in COLOURS for shape in SHAPES for _ in range(PER_CONCEPT)]
    with ProcessPoolExecutor() as pool:
        bodies = list(pool.map(web.drawn, scenes, chunksize=32))
    tasks = {task: folder / task.replace(" ", "_") for task in TASKS}
    for task, (words, prompts) in TASKS.items():
        for number, (scene, body) in enumerate(zip(scenes, bodies)):
            label = " ".join(getattr(scene, word) for word in words)
            place = tasks[task] / label
            place.mkdir(parents=True, exist_ok=True)
            (place / f"{number:04d}.jpg").write_bytes(body)
        tasks[task].with_suffix(".txt").write_text("\n".join(prompts) + "\n", encoding="utf-8")
    return tasks


@guarded()
def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit status. SystemExit 2 for a wrong argument."""
    parser = argparse.ArgumentParser(
        prog="winnow demo", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--pictures", type=_positive, default=PICTURES, help="clean rows of the web; noisy rows are added (%(default)s)"
    )
    parser.add_argument("--seed", type=int, default=SEED, help="seed of the web and the held-out scenes (%(default)s)")
    parser.add_argument(
        "--port", type=int, default=web.PORT, help="port of the web on 127.0.0.1; another if it is taken (%(default)s)"
    )
    args = parser.parse_args(argv)
    console = Console()
    if not console.is_terminal:
        console.width = 140
    started = time.monotonic()

    def command(*words: str) -> None:
        console.print(f"\n[bold]$ python -m {shlex.join(words)}[/bold]", highlight=False, soft_wrap=True)
        subprocess.run([sys.executable, "-m", *words], check=True)

    for folder in (WEB, RUN, HELDOUT):
        shutil.rmtree(folder, ignore_errors=True)
    try:
        with web.open_port(args.port) as server:
            rows = web.build(WEB, args.pictures, args.seed, server.server_port)
            console.print(
                f"Serving {rows} captioned pictures, clean and noisy, at http://127.0.0.1:{server.server_port}"
            )
            with web.serving(server, WEB):
                command("pipeline.run", *recipe(server.server_port))
        truth.show(truth.judge(*truth.read(RUN, WEB)), console)

        command("trainer.train", _shown(init.recipes()["train_demo"]))
        tasks = draw_heldout(HELDOUT, seed=args.seed + 1)
        results = {task: zero_shot(folder) for task, folder in tasks.items()}
    except subprocess.CalledProcessError as error:
        console.error(f"`{shlex.join(error.cmd[1:])}` failed with status {error.returncode}; see above")
        return 1
    _show_accuracy(console, results, tasks)
    report = f", report in {RUN}/report/index.html" if (RUN / "report" / "index.html").exists() else ""
    console.say(
        f"\nrun in {RUN}/{report}, model in {RUN}/model/ (open_clip: local-dir:{RUN}/model), web and truth in {WEB}/\n"
        f"{time.monotonic() - started:.0f} s in total"
    )
    return 0


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"found {text!r}, expected a whole number of at least 1")
    return int(text)


def zero_shot(data: Path) -> float:
    """Top-1 accuracy of the trained model on a folder of classes, 0 to 1."""
    words = ["--model", str(RUN / "model"), "--data", str(data), "--templates", str(data.with_suffix(".txt"))]
    command = [sys.executable, "-m", "trainer.evaluate", "zeroshot", *words]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return float(json.loads(done.stdout)["metrics"]["acc1"])


def _show_accuracy(console: Console, results: dict[str, float], tasks: dict[str, Path]) -> None:
    table = Table(title="\nZero-shot accuracy of the trained model on held-out scenes", title_justify="left")
    for name in ("task", "classes", "accuracy", "chance", "times chance"):
        table.add_column(name, justify="left" if name == "task" else "right")
    for task, accuracy in results.items():
        classes = sum(1 for _ in tasks[task].iterdir())
        table.add_row(task, str(classes), f"{accuracy:.3f}", f"{1 / classes:.3f}", f"{accuracy * classes:.1f}")
    console.print(table)


if __name__ == "__main__":
    sys.exit(main())
