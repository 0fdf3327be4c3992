"""Generates synthetic photographs, so that benchmarks need neither a network nor licensed pictures.

    python benchmarks/corpus.py FOLDER [FILES]         default: 2000

The cost of decoding and resizing a photograph depends on its spectrum and its edges. The pictures follow the *dead
leaves* model (Lee, Mumford and Huang, "Occlusion models for natural images", 2001): opaque shapes with radii of density
r^-3 cover each other, which gives the edges and the 1/f amplitude spectrum of natural scenes. Each leaf has a texture
of 1/f noise; brightness changes slowly across the frame; a blur of about one pixel stands for the lens, and noise for
the sensor. Sizes and qualities are drawn to match files on the web: 500 to 1600 pixels, a median of about 80 KB, a mean
of about 115 KB; of 100 files 86 are baseline JPEGs, 8 progressive JPEGs, 3 PNGs (drawings in flat colours) and 3 WebPs.
Equal arguments give equal pixels; with the same version of Pillow, the files are equal too.
"""

from __future__ import annotations

import functools
import json
import sys
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import cv2
import numpy as np
from PIL import Image

VERSION = 1
SEED = 0
# (kind, share of the files, file extension)
KINDS = (("baseline", 0.86, "jpg"), ("progressive", 0.08, "jpg"), ("png", 0.03, "png"), ("webp", 0.03, "webp"))
_TILE = 1024


def make(folder: Path, files: int) -> list[str]:
    """Makes `files` pictures in `folder`, unless it already holds exactly these, and returns their names."""
    listing = folder / "corpus.json"
    wanted = {"version": VERSION, "seed": SEED, "files": files}
    if listing.exists() and wanted.items() <= (corpus := json.loads(listing.read_text())).items():
        return list(corpus["names"])
    folder.mkdir(parents=True, exist_ok=True)
    with ProcessPoolExecutor() as pool:
        names = list(pool.map(functools.partial(_make_one, folder), range(files), chunksize=8))
    listing.write_text(json.dumps({**wanted, "names": names}))  # last, since it marks the corpus as complete
    return names


def _make_one(folder: Path, number: int) -> str:
    cv2.setNumThreads(1)
    rng = np.random.default_rng((SEED, number))
    # A golden-ratio sequence spreads the kinds evenly, so that any range of the files has them in proportion.
    at = (number * 0.6180339887 + 0.5) % 1.0
    shares = np.cumsum([share for _, share, _ in KINDS])
    kind, _, ending = KINDS[min(int(np.searchsorted(shares, at, side="right")), len(KINDS) - 1)]
    side = int(np.clip(rng.lognormal(np.log(830), 0.42), 500, 1600))
    ratio = float(rng.choice([1.0, 1.25, 4 / 3, 1.5, 16 / 9], p=[0.15, 0.1, 0.35, 0.3, 0.1]))
    size = (side, round(side / ratio))
    width, height = size if rng.random() < 0.7 else size[::-1]
    picture = Image.fromarray(drawing(rng, width, height) if kind == "png" else photograph(rng, width, height))
    name = f"{number:05d}.{ending}"
    quality = int(rng.choice([70, 75, 80, 85, 90, 95], p=[0.1, 0.15, 0.25, 0.2, 0.2, 0.1]))
    match kind:
        case "png":
            picture.save(folder / name, "PNG")
        case "webp":
            picture.save(folder / name, "WEBP", quality=min(quality, 85), method=2)
        case _:
            picture.save(folder / name, "JPEG", quality=quality, progressive=kind == "progressive")
    return name


def photograph(rng: np.random.Generator, width: int, height: int) -> np.ndarray:
    """Returns a (height, width, 3) uint8 picture with the spectrum of a photograph."""
    image: np.ndarray = _leaves(rng, width, height, textured=True).astype(np.float32)
    # Lighting: a slow gradient over the frame.
    corners = rng.uniform(0.55, 1.25, (2, 2)).astype(np.float32)
    image *= cv2.resize(corners, (width, height), interpolation=cv2.INTER_LINEAR)[..., None]
    image = cv2.GaussianBlur(image, (0, 0), float(rng.uniform(0.6, 1.2)))
    grain = _crop(rng, _white_noise(), width, height)
    image += grain[..., None] * np.float32(rng.uniform(0.5, 3.5))
    return image.clip(0, 255).astype(np.uint8)


def drawing(rng: np.random.Generator, width: int, height: int) -> np.ndarray:
    """Returns a (height, width, 3) uint8 picture of few, flat colours, like most PNGs on the web."""
    return _leaves(rng, width, height, textured=False)


def _leaves(rng: np.random.Generator, width: int, height: int, textured: bool) -> np.ndarray:
    image: np.ndarray = np.empty((height, width, 3), np.uint8)
    # As in photographs, brightness varies far more than colour does.
    palette = (rng.uniform(15, 240, (12, 1)) + rng.normal(0, 28, (12, 3))).clip(0, 255)
    image[:] = palette[0]
    if textured:
        image = _texture(rng, image)
    leaves = 64 if textured else 40
    least, most = max(width, height) / 60, max(width, height) / 2
    # Inverse transform sampling of the density r^-3. The largest are drawn first: later ones would cover all others.
    radii = 1 / np.sqrt(rng.uniform(1 / most**2, 1 / least**2, leaves))
    radii[: leaves // 10] = rng.uniform(most / 4, most, leaves // 10)
    for radius in np.sort(radii)[::-1]:
        colour = (palette[rng.integers(len(palette))] + rng.normal(0, 6, 3)).clip(0, 255)
        angles = np.sort(rng.uniform(0, 2 * np.pi, rng.integers(3, 12)))
        if rng.random() < 0.5:  # half are round
            angles = np.linspace(0, 2 * np.pi, 24, endpoint=False)
        stretch = rng.uniform(0.4, 1.0)
        centre = rng.uniform((0, 0), (width, height))
        turn = rng.uniform(0, np.pi)
        x, y = np.cos(angles) * radius, np.sin(angles) * radius * stretch
        outline = np.stack([x * np.cos(turn) - y * np.sin(turn), x * np.sin(turn) + y * np.cos(turn)], 1) + centre
        points = np.rint(outline * 16).astype(np.int32)
        left, top = np.maximum(np.floor(outline.min(0)).astype(int) - 1, 0)
        right, bottom = np.minimum(np.ceil(outline.max(0)).astype(int) + 2, (width, height))
        if right <= left or bottom <= top:
            continue
        if not textured:
            cv2.fillPoly(image, [points], colour.tolist(), cv2.LINE_AA, shift=4)
            continue
        patch = image[top:bottom, left:right]
        cover = np.zeros(patch.shape[:2], np.uint8)
        cv2.fillPoly(cover, [points - np.array((left, top), np.int32) * 16], 255, cv2.LINE_AA, shift=4)
        leaf = np.empty_like(patch)
        leaf[:] = colour
        leaf = _texture(rng, leaf)
        weight = cover[..., None].astype(np.uint16)
        patch[:] = ((leaf * weight + patch * (255 - weight) + 127) // 255).astype(np.uint8)
    return image


def _texture(rng: np.random.Generator, patch: np.ndarray) -> np.ndarray:
    height, width = patch.shape[:2]
    # Log-normal: most surfaces are nearly smooth, a few are as rough as grass.
    strength = np.float32(np.exp(rng.normal(np.log(14), 0.8)))
    noise = _crop(rng, _pink_noise(), width, height)
    return (patch + noise[..., None] * strength).clip(0, 255).astype(np.uint8)


def _crop(rng: np.random.Generator, tile: np.ndarray, width: int, height: int) -> np.ndarray:
    """Cuts a `width` by `height` piece at a random position of a tile that was repeated by `_repeated`."""
    top, left = rng.integers(0, _TILE, 2)
    return tile[top : top + height, left : left + width]


@functools.cache
def _pink_noise() -> np.ndarray:
    """Returns noise of amplitude 1/f, mean 0 and standard deviation 1, repeated to cover any picture."""
    spectrum = np.fft.rfft2(np.random.default_rng(SEED).normal(size=(_TILE, _TILE)))
    frequency = np.hypot(np.fft.fftfreq(_TILE)[:, None], np.fft.rfftfreq(_TILE)[None])
    frequency[0, 0] = np.inf
    return _repeated(np.fft.irfft2(spectrum / frequency))


@functools.cache
def _white_noise() -> np.ndarray:
    return _repeated(np.random.default_rng(SEED + 1).normal(size=(_TILE, _TILE)))


def _repeated(tile: np.ndarray) -> np.ndarray:
    return np.tile((tile / tile.std()).astype(np.float32), (3, 3))


if __name__ == "__main__":
    target = Path(sys.argv[1])
    sizes = [(target / name).stat().st_size for name in make(target, int((sys.argv[2:] or ["2000"])[0]))]
    print(f"{len(sizes)} files, mean {np.mean(sizes) / 1e3:.0f} KB, median {np.median(sizes) / 1e3:.0f} KB")
