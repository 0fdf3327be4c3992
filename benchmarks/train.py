"""Compares the training speed of `trainer.train` and of open_clip's `open_clip_train` on the same shards.

    python benchmarks/train.py                                         the CPU comparison, about ten minutes on 2 cores
    python benchmarks/train.py --precision fp32                        the same in fp32, for CPUs without bf16
    python benchmarks/train.py --device cuda --models ViT-B-32,ViT-B-16 --batch 1024 --samples 102400 --largest 131072

Both loops train the same architecture from fresh fp32 weights, by default in bf16 autocast, with the same batch,
optimiser, schedule, and numbers of workers and threads, on the same tars, for exactly one epoch. They run one at a
time, each in a separate process, and their order alternates between rounds. Both print a line per step (per ten steps
on a GPU). When a line arrives, this script reads the clock and the CPU time of the process tree. Rates are taken
between the end of a warm-up and the end of the epoch, which excludes imports, the creation of the model, the first
filling of buffers and the final checkpoint for both loops. It also excludes the batches that the workers have prepared
by the end of the warm-up. That favours the loop with the more expensive decoding.

Differences that affect the ratio:
- Crops: CLIP takes the largest square at a random position. open_clip_train cannot; its nearest option is
  RandomResizedCrop with scale (1, 1), which falls back to the centre of the picture for the shapes used here.
- Padding: captions vary in length like web alt text. Winnow computes nothing for padding, without changing the result;
  open_clip_train always computes it.
- OpenMP: the settings of Winnow's trainer (trainer/__init__.py) apply to open_clip_train as well.

open_clip_train fails with the version of webdataset that this project uses, so it runs in a separate environment. This
is made once, in `$XDG_CACHE_HOME/winnow`, from the package index that pip is configured for; `--peer-python` uses an
existing one. The final loss, the mean over the last eighth of the epoch, shows whether both loops did the same work.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import re
import signal
import statistics
import subprocess
import sys
import tarfile
import tempfile
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch.utils.flop_counter import FlopCounterMode

from trainer.model import create, encode_trimmed, open_clip, trim, untrimmed

ROOT = Path(__file__).parents[1]
OPEN_CLIP, WEBDATASET = "open_clip_torch[training]==3.3.0", "webdataset<=0.2.86"
MODELS = {  # in addition to those of open_clip and trainer/configs
    "small-64": {
        "embed_dim": 256,
        "vision_cfg": {"image_size": 64, "patch_size": 16, "width": 256, "layers": 8, "head_width": 64},
        "text_cfg": {"context_length": 32, "vocab_size": 49408, "width": 256, "heads": 4, "layers": 4},
    }
}
LR, WARMUP, DECAY, BETAS, EPS = 1e-3, 8, 0.2, (0.9, 0.98), 1e-6
DISTINCT = 8192
"""Number of different samples. A longer epoch repeats them."""
PEER_PRECISION = {"fp32": "fp32", "bf16": "amp_bf16", "fp16": "amp"}
"""The names that open_clip_train uses for each precision."""
ALIKE = 0.25
"""Nats by which the final losses may differ; they start at ln(batch). Weights, order and crops are drawn separately,
which alone causes a difference of 0.12 after about 30 steps."""
PATIENCE = 1800
"""Seconds after which a run is killed."""
PEAK_TFLOPS = {"H200": 989, "H100": 989, "A100": 312, "L40": 181, "L4": 121, "4090": 165}
"""Dense bf16 TFLOP/s from NVIDIA's data sheets (SXM if there are several variants)."""

# Both loops start through these lines. They add the models, and importing trainer.model works around a torchvision that
# cannot load with a CPU build of torch.
LAUNCH = """\
import runpy, sys
from trainer.model import open_clip
open_clip.add_model_config(sys.argv[1])
sys.argv = sys.argv[2:]
runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
"""
OUR_LINE = re.compile(r"step (?P<step>\d+)/\d+ .*loss (?P<loss>\S+) .*data wait (?P<wait>\d+)%")
THEIR_LINE = re.compile(
    r"Train Epoch: 0 \[\s*(?P<samples>\d+)/.*"
    r"Data \(t\): (?P<data>\S+) Batch \(t\): (?P<batch>[\d.]+),.* Loss: (?P<loss>\S+)"
)


class OutOfMemoryError(RuntimeError):
    """A run ran out of device memory."""


@dataclass(frozen=True)
class Mark:
    """The state of a run when it printed a line."""

    step: int
    at: float
    """clock, in seconds"""
    cpu: float
    """CPU seconds of the process and its workers"""
    loss: float
    wait: float
    """share of the step's time spent waiting for data"""


@dataclass(frozen=True)
class Outcome:
    """The results of one epoch without its warm-up."""

    rate: float
    """samples per second"""
    cpu: float
    """CPU seconds per 1,000 samples"""
    memory: float
    """peak MB of the training process"""
    loss: float
    wait: float


@dataclass(frozen=True)
class Setting:
    """The settings that both loops share."""

    model: str
    folder: Path
    samples: int
    batch: int
    workers: int
    device: str
    precision: str
    peer_precision: str
    compile: bool
    models: Path
    scratch: Path

    @property
    def log_every(self) -> int:
        # For each line, open_clip_train waits for the GPU, which it does nowhere else.
        return 1 if self.device == "cpu" else 10

    def ours(self, shards: Sequence[dict[str, object]] | str, micro_batch: int | None = None) -> list[str]:
        output = tempfile.mkdtemp(dir=self.scratch)
        conf = Path(output) / "train.yaml"
        config = {
            "shards": shards, "output": output, "model": self.model, "batch_size": self.batch, "epochs": 1,
            "lr": LR, "warmup": WARMUP, "weight_decay": DECAY, "beta1": BETAS[0], "beta2": BETAS[1], "eps": EPS,
            "precision": self.precision, "device": self.device, "workers": self.workers, "compile": self.compile,
            "micro_batch_size": micro_batch, "log_every": self.log_every, "checkpoint_every": 1 << 30,
            "resume": "none", "export": False,
        }  # fmt: skip
        conf.write_text(json.dumps(config))
        return [sys.executable, "-c", LAUNCH, str(self.models), "trainer.train", str(conf)]

    def theirs(self, peer: Path, data: Sequence[str]) -> list[str]:
        return [
            str(peer), "-c", LAUNCH, str(self.models), "open_clip_train.main", *data,
            "--model", self.model, "--batch-size", str(self.batch), "--epochs", "1", "--workers", str(self.workers),
            "--lr", str(LR), "--warmup", str(WARMUP), "--wd", str(DECAY),
            "--beta1", str(BETAS[0]), "--beta2", str(BETAS[1]), "--eps", str(EPS),
            "--precision", self.peer_precision, "--device", self.device, "--aug-cfg", "scale=(1.0,1.0)",
            "--log-every-n-steps", str(self.log_every), "--save-frequency", "0",
            "--logs", tempfile.mkdtemp(dir=self.scratch), *(["--torchcompile"] if self.compile else []),
        ]  # fmt: skip


def main(args: argparse.Namespace) -> None:
    with tempfile.TemporaryDirectory(prefix="winnow-train-") as name:
        scratch = Path(name)
        models = scratch / "models"
        models.mkdir()
        for model, config in MODELS.items():
            (models / f"{model}.json").write_text(json.dumps(config))
        open_clip.add_model_config(models)
        peer = args.peer_python or peer_environment()
        print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {args.workers} workers, {args.device}")
        ratios, cpu_ratios = [], []
        for model in args.models.split(","):
            size = open_clip.get_model_config(model)["vision_cfg"]["image_size"]
            folder = scratch / f"shards-{size}"
            # open_clip_train repeats samples unless each worker gets whole batches.
            unit = args.batch * max(1, args.workers)
            samples = -(-args.samples // unit) * unit
            if not folder.exists():
                write(folder, samples, unit, size)
            setting = Setting(
                model, folder, samples, args.batch, args.workers, args.device, args.precision,
                args.peer_precision or PEER_PRECISION[args.precision], args.compile, models, scratch,
            )  # fmt: skip
            ratio, cpu_ratio = compare(setting, peer, args.rounds, args.peak_tflops)
            ratios.append(ratio)
            cpu_ratios.append(cpu_ratio)
            if args.largest:
                largest(setting, peer, args.largest)
    # The model with the smallest gain.
    print(f"RESULT train_ratio={min(ratios):.2f} cpu_ratio={min(cpu_ratios):.2f}")


def compare(setting: Setting, peer: Path, rounds: int, peak_tflops: float | None) -> tuple[float, float]:
    """Returns the median ratios of Winnow to open_clip_train, in samples per second and per second of CPU time."""
    print(
        f"\n{setting.model}: {setting.samples:,} samples, batch {setting.batch}, {setting.precision} against "
        f"{setting.peer_precision}\n"
        f"{'':<24} {'samples/s':>10} {'CPU s/1,000':>12} {'peak MB':>8} {'loss':>7} {'waits':>6}"
    )
    tars = sorted(str(path) for path in setting.folder.glob("*.tar"))
    pattern = f"{setting.folder}/{{{Path(tars[0]).stem}..{Path(tars[-1]).stem}}}.tar"
    data = ["--train-data", pattern, "--dataset-type", "webdataset", "--train-num-samples", str(setting.samples)]
    outcomes: dict[str, list[Outcome]] = {"winnow": [], "open_clip_train": []}
    for turn in range(rounds):
        for name in sorted(outcomes, reverse=turn % 2 == 0):
            command = setting.ours(str(setting.folder)) if name == "winnow" else setting.theirs(peer, data)
            marks, memory = run(command, setting)
            outcomes[name].append(outcome := outcome_of(marks, memory, setting))
            show(f"{name}, round {turn + 1}", outcome)
    ours, theirs = (median(outcomes[name]) for name in ("winnow", "open_clip_train"))
    for name, outcome in (("winnow, median", ours), ("open_clip_train, median", theirs)):
        show(name, outcome)
    if setting.device != "cpu":
        show_utilisation(setting, ours, theirs, peak_tflops)
    if not abs(ours.loss - theirs.loss) < ALIKE:
        raise SystemExit(f"the losses differ by {abs(ours.loss - theirs.loss):.2f}: the loops did different work")
    ratio = statistics.median(a.rate / b.rate for a, b in zip(outcomes["winnow"], outcomes["open_clip_train"]))
    cpu_ratio = statistics.median(b.cpu / a.cpu for a, b in zip(outcomes["winnow"], outcomes["open_clip_train"]))
    print(f"{setting.model}: train_ratio {ratio:.2f}, cpu_ratio {cpu_ratio:.2f}", flush=True)
    return ratio, cpu_ratio


def show(label: str, outcome: Outcome) -> None:
    print(
        f"{label:<24} {outcome.rate:>10,.1f} {outcome.cpu:>12.2f} {outcome.memory:>8,.0f} {outcome.loss:>7.3f} "
        f"{outcome.wait:>6.1%}",
        flush=True,
    )


def median(outcomes: list[Outcome]) -> Outcome:
    return Outcome(*(statistics.median(values) for values in zip(*(vars(outcome).values() for outcome in outcomes))))


def outcome_of(marks: list[Mark], memory: float, setting: Setting) -> Outcome:
    steps = setting.samples // setting.batch
    warm_up = max(setting.log_every, steps // 8)
    first = next(mark for mark in marks if mark.step >= warm_up)
    last = marks[-1]
    if last.step != steps or last.step <= first.step:
        raise SystemExit(f"{last.step} steps of {steps}: the epoch is too short, or did not finish")
    samples = (last.step - first.step) * setting.batch
    after = [mark for mark in marks if mark.step > first.step]
    tail = [mark.loss for mark in marks if mark.step > steps - max(setting.log_every, steps // 8)]
    return Outcome(
        samples / (last.at - first.at),
        1000 * (last.cpu - first.cpu) / samples,
        memory,
        statistics.mean(tail),
        statistics.mean(mark.wait for mark in after),
    )


def run(command: list[str], setting: Setting) -> tuple[list[Mark], float]:
    """Runs a training to its end. Returns a mark for each line about its steps, and the peak MB of its process."""
    # The other environment does not have winnow installed, so both import it by path.
    paths = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    environment = os.environ | {"PYTHONPATH": paths, "TERM": "dumb"}  # with OpenMP's variables, from `import trainer`
    process = subprocess.Popen(
        command, cwd=setting.scratch, env=environment, start_new_session=True, text=True,
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    alarm = threading.Timer(PATIENCE, os.killpg, (process.pid, signal.SIGKILL))
    alarm.start()
    marks, log, memory = [], [], 0.0
    try:
        assert process.stdout is not None
        for line in process.stdout:
            now = time.perf_counter()
            log.append(line)
            if match := OUR_LINE.search(line) or THEIR_LINE.search(line):
                values = match.groupdict()
                step = int(values["step"]) if "step" in values else int(values["samples"]) // setting.batch
                wait = int(values["wait"]) / 100 if "wait" in values else float(values["data"]) / float(values["batch"])
                marks.append(Mark(step, now, cpu_seconds(process.pid), float(values["loss"]), wait))
                memory = peak_memory(process.pid)
        status = process.wait()
    finally:
        alarm.cancel()
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # includes workers that outlived their parent
        process.wait()
    text = "".join(log)
    if status and "out of memory" in text.lower():
        raise OutOfMemoryError(text)
    if status or not marks:
        raise SystemExit(f"{' '.join(command[3:])}\nended with {status}:\n{text[-4000:]}")
    return marks, memory


def cpu_seconds(process: int) -> float:
    """Returns the CPU time of a process, of its living descendants, and of the processes they have waited for."""
    try:
        fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
        children = Path(f"/proc/{process}/task/{process}/children").read_text().split()
    except OSError:
        return 0.0
    own = sum(int(field) for field in fields[11:15]) / os.sysconf("SC_CLK_TCK")
    return own + sum(cpu_seconds(int(child)) for child in children)


def peak_memory(process: int) -> float:
    try:
        field = re.search(r"VmHWM:\s+(\d+) kB", Path(f"/proc/{process}/status").read_text())
    except OSError:
        return 0.0
    return int(field[1]) / 1024 if field else 0.0


# --- On a GPU ---------------------------------------------------------------------------------------------------------


def show_utilisation(setting: Setting, ours: Outcome, theirs: Outcome, peak_tflops: float | None) -> None:
    """Prints the FLOPs of the model as a share of the device's peak. Padding that is skipped does not count."""
    name = torch.cuda.get_device_name()
    peak = peak_tflops or next((value for key, value in PEAK_TFLOPS.items() if key in name), None)
    if peak is None:
        print(f"{name}: unknown peak; pass --peak-tflops")
        return
    model, _, tokenizer = create(setting.model, "meta")
    tokens = tokenizer([sample[1] for sample in sketches(setting.batch, 8)])
    for loop, captions, outcome in (
        ("winnow", trim(model, tokens, 8), ours), ("open_clip_train", untrimmed(tokens), theirs)
    ):  # fmt: skip
        flops = sum(len(group) * training_flops(setting.model, group.shape[1]) for group in captions.groups)
        flops /= setting.batch
        length = sum(group.numel() for group in captions.groups) / setting.batch
        print(
            f"{loop}: {flops / 1e9:.1f} GFLOPs per sample at {length:.1f} tokens, "
            f"{outcome.rate * flops / (peak * 1e12):.1%} of the {peak} TFLOP/s of {name}"
        )


def training_flops(name: str, tokens: int) -> float:
    """Returns the FLOPs of one sample, with the backward pass counted as two forward passes."""
    with torch.device("meta"):
        model, preprocess, _ = create(name, "meta")
        pixels, text = torch.empty(2, 3, preprocess.size, preprocess.size), torch.zeros(2, tokens, dtype=torch.long)
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            model.encode_image(pixels)
            encode_trimmed(model, untrimmed(text))
    return 3 * counter.get_total_flops() / 2


def largest(setting: Setting, peer: Path, most: int) -> None:
    """Doubles the batch until the device runs out of memory, and prints the largest batch that fits.

    Winnow trains in micro-batches of the setting's batch size, open_clip_train without micro-batches.
    """
    for name in ("winnow", "open_clip_train"):
        fits, batch = 0, setting.batch
        while batch <= most:
            trial = Setting(**(vars(setting) | {"batch": batch, "samples": 2 * batch * max(1, setting.workers)}))
            copies = -(-trial.samples // setting.samples)
            shards = [{"path": str(setting.folder), "weight": 1} for _ in range(copies)]
            synthetic = ["--dataset-type", "synthetic", "--train-num-samples", str(trial.samples)]
            command = trial.ours(shards, setting.batch) if name == "winnow" else trial.theirs(peer, synthetic)
            try:
                run(command, trial)
            except OutOfMemoryError:
                break
            fits, batch = batch, batch * 2
        limit = f"{batch:,} does not" if batch <= most else "larger ones were not tried"
        print(f"{name}: a batch of {fits:,} fits, {limit}", flush=True)


# --- Environment and data ---------------------------------------------------------------------------------------------


def peer_environment() -> Path:
    """Returns the interpreter of an environment with open_clip_train and this torch, and makes it if it is missing."""
    version = torch.__version__.partition("+")[0]
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "winnow"
    folder = cache / f"open_clip_train-3.3.0-torch-{version}-py{sys.version_info.major}.{sys.version_info.minor}"
    python = folder / "bin" / "python"
    if not (folder / "ready").exists():
        print(f"making an environment for open_clip_train in {folder}", flush=True)
        subprocess.run([sys.executable, "-m", "venv", "--clear", str(folder)], check=True)
        pins = (ROOT / "constraints.txt").read_text().splitlines()
        constraints = folder / "constraints.txt"
        constraints.write_text("\n".join(pin for pin in pins if not pin.startswith("webdataset==")))
        pip = [str(python), "-m", "pip", "install", "--quiet", "-c", str(constraints)]
        # torch first and alone, so that pip takes a CPU build of this version if the index has one.
        subprocess.run([*pip, f"torch=={version}"], check=True)
        subprocess.run([*pip, f"torch=={version}", OPEN_CLIP, WEBDATASET], check=True)
        (folder / "ready").touch()
    theirs = subprocess.check_output([str(python), "-c", "import torch; print(torch.__version__)"], text=True).strip()
    if theirs != torch.__version__:
        raise SystemExit(f"{python}: torch {theirs}, not {torch.__version__}; remove {folder} and start again")
    return python


def write(folder: Path, samples: int, unit: int, size: int) -> None:
    """Writes tars of `samples` samples in img2dataset's layout, for a model with inputs of `size` pixels.

    A tar has half of `unit` samples if `unit` is even, else `unit` samples.
    """
    folder.mkdir()
    made = sketches(min(samples, DISTINCT), size)
    for start in range(0, samples, per_tar := unit // 2 if unit % 2 == 0 else unit):
        with tarfile.open(folder / f"{start // per_tar:05d}.tar", "w", format=tarfile.USTAR_FORMAT) as tar:
            for number in range(start, start + per_tar):
                image, caption = made[number % len(made)]
                about = json.dumps({"caption": caption, "key": f"{number:09d}"})
                for suffix, data in (("jpg", image), ("json", about.encode()), ("txt", caption.encode())):
                    member = tarfile.TarInfo(f"{number:09d}.{suffix}")
                    member.size = len(data)
                    tar.addfile(member, io.BytesIO(data))


COLOURS = "red orange yellow green cyan blue purple pink brown black white grey".split()
PLACES = "left centre right".split()
SHAPES = ("circle", "square", "triangle", "cross")
FILLER = (
    "in the with and a new for photo of by at day home old view from street summer free image vintage city park water "
    "light house garden art design best stock black set hand made happy little two night sun food morning winter"
).split()


def sketches(count: int, size: int) -> list[tuple[bytes, str]]:
    """Draws JPEGs of a shape with noise, with sides of 1.1 to 1.7 times `size`, and captions that describe them."""
    rng = np.random.default_rng(0)
    made = []
    for _ in range(count):
        shorter = round(size * rng.uniform(1.1, 1.3))
        width, height = rng.permutation([shorter, round(shorter * rng.choice([1, 1.25, 4 / 3]))]).tolist()
        ground, ink = rng.choice(COLOURS, 2, replace=False)
        shape, place = rng.choice(SHAPES), rng.integers(3)
        image = Image.new("RGB", (width, height), str(ground))
        radius = rng.uniform(0.15, 0.3) * shorter
        # The shape lies inside every square that a crop can take.
        x, y = width / 2 + (place - 1) * shorter * 0.15, height / 2 + rng.uniform(-0.1, 0.1) * shorter
        draw_shape(ImageDraw.Draw(image), str(shape), x, y, radius, str(ink))
        noise = rng.normal(0, 8, (height, width, 1)) + np.asarray(image, np.float32)
        file = io.BytesIO()
        Image.fromarray(noise.clip(0, 255).astype(np.uint8)).save(file, "JPEG", quality=85)
        # As long as web alt text: half of the captions have up to 11 words, one in a hundred over 35.
        words = max(4, int(rng.lognormal(np.log(11), 0.5)))
        caption = [str(ink), str(shape), PLACES[place], str(ground), *rng.choice(FILLER, words)][:words]
        made.append((file.getvalue(), " ".join(caption)))
    return made


def draw_shape(draw: ImageDraw.ImageDraw, shape: str, x: float, y: float, radius: float, ink: str) -> None:
    box = (x - radius, y - radius, x + radius, y + radius)
    if shape == "circle":
        draw.ellipse(box, ink)
    elif shape == "square":
        draw.rectangle(box, ink)
    elif shape == "triangle":
        draw.polygon([(x, box[1]), (box[2], box[3]), (box[0], box[3])], ink)
    else:
        draw.rectangle((x - radius / 4, box[1], x + radius / 4, box[3]), ink)
        draw.rectangle((box[0], y - radius / 4, box[2], y + radius / 4), ink)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default="small-64,scorer-64", help="comma-separated names (default: %(default)s)")
    parser.add_argument("--samples", type=int, default=8192, help="fewest in the epoch (default: %(default)s)")
    parser.add_argument("--batch", type=int, default=256, help="(default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=3, help="(default: %(default)s)")
    parser.add_argument("--workers", type=int, default=2, help="decoding processes of each loop (default: %(default)s)")
    parser.add_argument("--device", default="cpu", help="cpu or cuda (default: %(default)s)")
    parser.add_argument("--compile", action="store_true", help="torch.compile in both loops")
    parser.add_argument("--precision", choices=PEER_PRECISION, default="bf16", help="(default: %(default)s)")
    parser.add_argument("--peer-precision", help="another --precision for open_clip_train")
    parser.add_argument("--peer-python", type=Path, help="interpreter of an environment with open_clip_train")
    parser.add_argument("--peak-tflops", type=float, help="dense bf16 peak of the GPU, if the script does not know it")
    parser.add_argument("--largest", type=int, help="also find the largest batch that fits, up to this one")
    main(parser.parse_args())
