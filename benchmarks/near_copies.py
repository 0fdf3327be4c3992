"""Measures recall and precision of perceptual hashes on altered copies, and compares them with imagededup's PHash.

    python benchmarks/near_copies.py [--pictures FOLDER] [--count 300] [--sets CSV] [--python PYTHON]

Alters each picture (of the demo, or the first COUNT of FOLDER by name) in seven ways. Recall at a distance is the share
of pictures whose altered copy has a hash within that distance. Precision is the share of the pairs of a picture and a
copy within that distance in which the copy was made from the picture. `winnow` hashes as `download` does. --python
names an interpreter that has imagededup, whose PHash is then measured too.

--sets measures pictures with known copies. CSV has rows of `file,copies` without a header and lies in the folder of the
pictures, where each picture is one of these files or a copy of one. A set counts as found if `near_dedup` at this
distance would join the file with exactly that number of others.
"""

from __future__ import annotations

import argparse
import csv
import json
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageEnhance, ImageOps

from pipeline.fetch.decoder import Rules, decode
from pipeline.similarity.hash_clusters import clusters

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
    parser.add_argument("--sets", type=Path, help="a table of pictures and the number of copies of each in its folder")
    parser.add_argument("--python", help="interpreter with imagededup")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        files: dict[str, list[str]] = {kind: [] for kind in ("original", *ALTERATIONS)}
        for i, picture in enumerate(pictures(args.pictures, args.count)):
            for number, (kind, paths) in enumerate(files.items()):
                alter, quality = ALTERATIONS.get(kind, (lambda same: same, 95))
                paths.append(f"{name}/{i}.{number}.jpg")
                alter(picture).save(paths[-1], "JPEG", quality=quality)
        contenders = {
            who: {kind: hashed(paths) for kind, paths in files.items()} for who, hashed in hashers(args.python).items()
        }
    print(f"{'recall / precision within':<26} {'':<10} " + " ".join(f"{f'{d} bits':>11}" for d in DISTANCES))
    recalls: dict[str, list[float]] = {who: [] for who in contenders}
    for kind in ALTERATIONS:
        for who, hashes in contenders.items():
            original, copies = hashes["original"], hashes[kind]
            apart = np.bitwise_count(original[:, None] ^ copies)
            cells = []
            for distance in DISTANCES:
                near = apart <= distance
                right = np.count_nonzero(np.diagonal(near))
                cells.append(f"{right / len(near):>5.3f}/{right / max(1, np.count_nonzero(near)):.3f}")
                if distance == 4:
                    recalls[who].append(right / len(near))
            print(f"{kind:<26} {who:<10} " + " ".join(f"{cell:>11}" for cell in cells))
    if args.sets:
        with args.sets.open(newline="") as file:
            wanted = {name: int(copies) for name, copies in csv.reader(file)}
        paths = [str(path) for path in sorted(args.sets.parent.iterdir()) if path != args.sets]
        at = np.array([Path(path).name in wanted for path in paths])
        others = np.array([wanted[Path(path).name] for path in np.array(paths)[at]])
        for who, hashed in hashers(args.python).items():
            distinct, place = np.unique(hashed(paths), return_inverse=True)
            sets = [clusters(distinct, distance)[place] for distance in DISTANCES]
            right = [np.mean(np.bincount(labels)[labels[at]] - 1 == others) for labels in sets]
            print(f"{f'{len(wanted)} sets found':<26} {who:<10} " + " ".join(f"{share:>11.3f}" for share in right))
    means = " ".join(f"{who}_recall_at_4={np.mean(values):.3f}" for who, values in recalls.items())
    print(f"RESULT pictures={len(original)} {means}")


def hashers(python: str | None) -> dict[str, Callable[[list[str]], np.ndarray]]:
    """Returns, for each contender, a function from n paths to their hashes, uint64 of shape (n,)."""

    def theirs(paths: list[str]) -> np.ndarray:
        assert python is not None
        words = [python, "-c", PEER]
        done = subprocess.run(words, input=json.dumps(paths), check=True, capture_output=True, text=True)
        digits = json.loads(done.stdout.splitlines()[-1])
        return np.array([int(digits[path], 16) for path in paths], np.uint64)

    def ours(paths: list[str]) -> np.ndarray:
        return np.array([_hash(path) for path in paths], np.uint64)

    return {"winnow": ours, **({"imagededup": theirs} if python else {})}


def pictures(folder: Path | None, count: int) -> list[Image.Image]:
    if folder is None:
        from pipeline.demo.scenes import draw, scenes

        return [draw(scene) for scene in scenes(count)]
    return [Image.open(path).convert("RGB") for path in sorted(folder.glob("*.jpg"))[:count]]


def _hash(path: str) -> int:
    phash = decode(Path(path).read_bytes(), Rules(extract_exif=False)).phash
    assert phash is not None
    return phash


if __name__ == "__main__":
    main()
