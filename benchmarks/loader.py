"""Compares the trainer's reader with plain tarfile and webdataset, its decoder with open_clip, and times data waits.

    python benchmarks/loader.py [SAMPLES] [--photos TAR]           default: 20000

Makes shards of 256 px JPEGs of 15 to 20 KB (mosaics of the photographs in TAR, or noise that compresses to the same
size) and reads every sample: the trainer's reader in random order, the others sequentially, which is the only order
they support. Rates are per second of CPU time of one process, the best of three passes, with the files in the page
cache. The last part trains with `python -m trainer.train` and reports the share of time spent waiting for data.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import torch
import webdataset as wds
from PIL import Image

from trainer.data import Shards, decode, square_crop
from trainer.model import open_clip
from trainer.order import shuffled
from trainer.shards import CorruptSampleError

PER_SHARD, BATCH, SIZE, DECODED = 2000, 256, 224, 1500


def main(samples: int, photos: Path | None) -> None:
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "shards"
        folder.mkdir()
        size = write(folder, samples, photos)
        print(f"{samples:,} samples of {size / 1024:.1f} KB in {len(list(folder.glob('*.tar')))} tars")
        started = time.process_time()
        shards = Shards(folder)
        print(f"index built in {time.process_time() - started:.2f} s of CPU time, worker processes not included")
        tars = [str(path) for path in sorted(folder.glob("*.tar"))]

        print(f"\n{'reading':<52} {'per CPU s':>10} {'per wall s':>10}")
        ours = best("winnow, random order", lambda: read_ours(shards))
        best("winnow, one by one", lambda: (shards.read(n) for n in order(shards)))
        best("tarfile, in tar order", lambda: read_tarfile(tars))
        theirs = best(
            "webdataset, in tar order", lambda: wds.WebDataset(tars, shardshuffle=False).to_tuple("jpg", "txt")
        )

        encoded = [shards.read(number)[0] for number in order(shards)[:DECODED]]
        clip = open_clip.image_transform(SIZE, is_train=False)
        print(f"\n{f'decoding to {SIZE} px':<52} {'per CPU s':>10} {'per wall s':>10}")
        crop = best("winnow: square crop, uint8", lambda: (square_crop(decode(e, SIZE), SIZE, 0.5) for e in encoded))
        pillow = best("open_clip: resize, centre crop, float, normalise", lambda: (clip(opened(e)) for e in encoded))
        train_clip = open_clip.image_transform(SIZE, is_train=True)
        best("open_clip: its training transform", lambda: (train_clip(opened(e)) for e in encoded))

        wait = waiting(folder, Path(name))
        print(f"\ntraining scorer-64 (64 px), batch 128, 2 workers: waits for data {wait:.1%} of the time")
    print(f"RESULT loader_ratio={ours / theirs:.2f} decode_ratio={crop / pillow:.2f} data_wait={wait:.4f}")


def order(shards: Shards) -> list[int]:
    return shuffled(np.arange(len(shards)), len(shards), seed=0, epoch=0).tolist()


def read_ours(shards: Shards) -> Iterable[object]:
    # Includes the cost of the random order.
    for start in range(0, len(shards), BATCH):
        numbers = shards.order(np.arange(start, min(start + BATCH, len(shards))), 0, 0)
        for sample in shards.read_many(numbers.tolist()):
            assert not isinstance(sample, CorruptSampleError)
            yield sample


def read_tarfile(tars: list[str]) -> Iterable[object]:
    for path in tars:
        with tarfile.open(path) as tar:
            image = b""
            for member in tar:
                file = tar.extractfile(member)
                assert file is not None
                data = file.read()
                if member.name.endswith(".jpg"):
                    image = data
                elif member.name.endswith(".txt"):
                    yield image, data.decode()


def opened(encoded: bytes) -> Image.Image:
    return Image.open(io.BytesIO(encoded)).convert("RGB")


def best(label: str, samples: Callable[[], Iterable[object]]) -> float:
    """Returns the best rate of three passes, in samples per second of CPU time."""
    rates = []
    for _ in range(3):
        wall, cpu = time.perf_counter(), time.process_time()
        count = sum(1 for _ in samples())
        rates.append((count / (time.process_time() - cpu), count / (time.perf_counter() - wall)))
    rate, wall_rate = max(rates)
    print(f"{label:<52} {rate:>10,.0f} {wall_rate:>10,.0f}", flush=True)
    return rate


def write(folder: Path, samples: int, photos: Path | None) -> float:
    """Writes shards in the layout of img2dataset and returns the mean size of an image in bytes."""
    tiles = list(pictures(photos)) if photos else []
    rng, total = np.random.default_rng(0), 0
    encoded = [jpeg(rng, tiles) for _ in range(min(samples, 2000))]
    for start in range(0, samples, PER_SHARD):
        with tarfile.open(folder / f"{start // PER_SHARD:05d}.tar", "w", format=tarfile.USTAR_FORMAT) as tar:
            for number in range(start, min(start + PER_SHARD, samples)):
                image = encoded[number % len(encoded)]
                total += len(image)
                about = json.dumps(
                    {"caption": f"picture {number}", "url": f"https://example.org/{number}", "width": 256}
                )
                for suffix, data in (("jpg", image), ("json", about.encode()), ("txt", b"picture %d" % number)):
                    member = tarfile.TarInfo(f"{number:09d}.{suffix}")
                    member.size = len(data)
                    tar.addfile(member, io.BytesIO(data))
    return total / samples


def pictures(photos: Path) -> Iterable[Image.Image]:
    with tarfile.open(photos) as tar:
        for member in tar:
            if file := tar.extractfile(member):
                with contextlib.suppress(OSError):
                    yield opened(file.read()).resize((128, 128))


def jpeg(rng: np.random.Generator, tiles: list[Image.Image]) -> bytes:
    width, height = [(256, 192), (192, 256), (256, 256)][rng.integers(3)]
    if tiles:
        image = Image.new("RGB", (256, 256))
        for place in range(4):
            image.paste(tiles[rng.integers(len(tiles))], (place % 2 * 128, place // 2 * 128))
        image = image.crop((0, 0, width, height))
    else:
        coarse = Image.fromarray(rng.integers(0, 256, (height // 4, width // 4, 3), dtype=np.uint8))
        image = coarse.resize((width, height), Image.Resampling.BICUBIC)
    file = io.BytesIO()
    image.save(file, "JPEG", quality=85 if tiles else 78)
    return file.getvalue()


def waiting(folder: Path, scratch: Path) -> float:
    """Returns the share of time that a short training waits for data, without the first logged steps."""
    output = scratch / "trained"
    (scratch / "train.yaml").write_text(
        f"{{shards: {folder}, output: {output}, model: scorer-64, lr: 1e-3, warmup: 10, batch_size: 128, epochs: 1, "
        f"workers: 2, device: auto, log_every: 5, export: false, checkpoint_every: 1000000}}"
    )
    command = [sys.executable, "-m", "trainer.train", str(scratch / "train.yaml")]
    with (scratch / "log").open("wb") as log:
        process = subprocess.Popen(command, stderr=log)
        try:
            while process.poll() is None and count(output) < 7:
                time.sleep(0.5)
        finally:
            process.terminate()
            process.wait()
    if count(output) < 2:
        raise SystemExit(f"trainer.train failed:\n{(scratch / 'log').read_text()}")
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    return float(np.mean([line["data_wait"] for line in lines[1:]]))


def count(output: Path) -> int:
    path = output / "metrics.jsonl"
    return len(path.read_text().splitlines()) if path.exists() else 0


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("samples", nargs="?", type=int, default=20_000)
    parser.add_argument("--photos", type=Path, help="a tar of photographs to make the pictures from")
    args = parser.parse_args()
    main(args.samples, args.photos)
