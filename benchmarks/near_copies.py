"""Recall and precision of perceptual hashes on altered copies, by alteration and distance, beside imagededup's pHash.

    python benchmarks/near_copies.py [--pictures FOLDER] [--count 300] [--python PYTHON]

Alters each picture (of the demo, or the first of FOLDER by name) in seven ways. Recall is the share of pictures whose
copy is within the distance; precision is the share of pairs of a picture and a copy within it that belong together.
`winnow` hashes as `download` does; with --python, an interpreter that has imagededup, its PHash is measured too.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageEnhance, ImageOps

from pipeline.fetch.decoder import Rules, decode

DISTANCES = (0, 2, 4, 8)
PEER = """
import json, sys
from imagededup.methods import PHash
method = PHash(verbose=False)
print(json.dumps({path: method.encode_image(image_file=path) for path in json.load(sys.stdin)}))
"""


def crop(picture: Image.Image) -> Image.Image:
    dx, dy = picture.width // 40, picture.height // 40  # 2.5% on each side
    return picture.crop((dx, dy, picture.width - dx, picture.height - dy))


def watermark(picture: Image.Image) -> Image.Image:
    marked = picture.copy()
    at = (picture.width // 2, picture.height * 9 // 10)
    ImageDraw.Draw(marked).text(at, "example.org", "white", anchor="mm", font_size=max(10, picture.height // 12))
    return marked


ALTERATIONS: dict[str, tuple[Callable[[Image.Image], Image.Image], int]] = {
    "re-encoded, quality 50": (lambda picture: picture, 50),
    "re-encoded, quality 15": (lambda picture: picture, 15),
    "half the size": (lambda picture: picture.resize((picture.width // 2, picture.height // 2)), 90),
    "cropped by 5%": (crop, 90),
    "brightened by 30%": (lambda picture: ImageEnhance.Brightness(picture).enhance(1.3), 90),
    "watermarked": (watermark, 90),
    "mirrored": (ImageOps.mirror, 90),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pictures", type=Path, help="a folder of JPEGs (default: the demo's)")
    parser.add_argument("--count", type=int, default=300)
    parser.add_argument("--python", help="interpreter with imagededup")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        files: dict[str, list[str]] = {kind: [] for kind in ("original", *ALTERATIONS)}
        for i, picture in enumerate(pictures(args.pictures, args.count)):
            for number, (kind, paths) in enumerate(files.items()):
                alter, quality = ALTERATIONS.get(kind, (lambda same: same, 95))
                paths.append(f"{name}/{i}.{number}.jpg")
                alter(picture).save(paths[-1], "JPEG", quality=quality)
        contenders = {"winnow": {kind: [_hash(path) for path in paths] for kind, paths in files.items()}}
        if args.python:
            everything = json.dumps([path for paths in files.values() for path in paths])
            done = subprocess.run(
                [args.python, "-c", PEER], input=everything, check=True, capture_output=True, text=True
            )
            peer = json.loads(done.stdout.splitlines()[-1])
            contenders["imagededup"] = {kind: [int(peer[p], 16) for p in paths] for kind, paths in files.items()}
    print(f"{'recall / precision within':<26} {'':<10} " + " ".join(f"{f'{d} bits':>11}" for d in DISTANCES))
    recalls: dict[str, list[float]] = {who: [] for who in contenders}
    for kind in ALTERATIONS:
        for who, hashes in contenders.items():
            original, copies = (np.array(hashes[k], np.uint64) for k in ("original", kind))
            apart = np.bitwise_count(original[:, None] ^ copies)
            cells = []
            for distance in DISTANCES:
                near = apart <= distance
                right = np.count_nonzero(np.diagonal(near))
                cells.append(f"{right / len(near):>5.3f}/{right / max(1, np.count_nonzero(near)):.3f}")
                if distance == 4:
                    recalls[who].append(right / len(near))
            print(f"{kind:<26} {who:<10} " + " ".join(f"{cell:>11}" for cell in cells))
    means = " ".join(f"{who}_recall_at_4={np.mean(found):.3f}" for who, found in recalls.items())
    print(f"RESULT pictures={len(original)} {means}")


def pictures(folder: Path | None, count: int) -> list[Image.Image]:
    if folder is None:
        from pipeline.demo.scenes import draw, scenes

        return [draw(scene) for scene in scenes(count)]
    return [Image.open(path).convert("RGB") for path in sorted(folder.glob("*.jpg"))[:count]]


def _hash(path: str) -> int:
    found = decode(Path(path).read_bytes(), Rules(extract_exif=False)).phash
    assert found is not None
    return found


if __name__ == "__main__":
    main()
