"""Writes shards from the description of their format, with tarfile alone."""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
from pathlib import Path

import numpy as np
from PIL import Image

from tests.images import encoded

COLOURS = {"red": (220, 30, 30), "green": (30, 180, 60), "blue": (40, 60, 220), "white": (240, 240, 240)}


def jpeg(image: Image.Image, kind: str = "JPEG") -> bytes:
    return encoded(image, kind)


def picture(colour: str, seed: int, size: tuple[int, int] = (80, 64)) -> Image.Image:
    noise = np.random.default_rng(seed).integers(-25, 25, (size[1], size[0], 3))
    return Image.fromarray(np.clip(noise + np.array(COLOURS[colour]), 0, 255).astype(np.uint8))


def samples(count: int) -> list[tuple[bytes, str]]:
    names = list(COLOURS)
    return [(jpeg(picture(names[i % 4], i)), f"a {names[i % 4]} picture") for i in range(count)]


def write_shards(folder: Path, pairs: list[tuple[bytes, str]], per_shard: int = 16, extension: str = "jpg") -> Path:
    folder.mkdir(parents=True)
    shards = []
    for start in range(0, len(pairs), per_shard):
        name, rows = f"{start // per_shard:05d}", []
        with tarfile.open(folder / f"{name}.tar", "w", format=tarfile.USTAR_FORMAT) as tar:
            for i, (image, caption) in enumerate(pairs[start : start + per_shard]):
                row = []
                for ending, data in ((extension, image), ("json", b"{}"), ("txt", caption.encode())):
                    member = tarfile.TarInfo(f"{start + i:09d}.{ending}")
                    member.size = len(data)
                    row += [tar.offset + 512, len(data)]
                    tar.addfile(member, io.BytesIO(data))
                rows.append(row)
        np.save(folder / f"{name}.index.npy", np.array(rows, np.int64))
        data = (folder / f"{name}.tar").read_bytes()
        shards.append(
            {
                "name": f"{name}.tar",
                "samples": len(rows),
                "bytes": len(data),
                "sha256": hashlib.sha256(data).hexdigest(),
                "parquet": f"{name}.parquet",
                "index": f"{name}.index.npy",
            }
        )
    manifest = {
        "format": "winnow-shards/1",
        "name": "test",
        "samples": len(pairs),
        "bytes": sum(shard["bytes"] for shard in shards),
        "samples_per_shard": per_shard,
        "extension": extension,
        "shards": shards,
    }
    (folder / "manifest.json").write_text(json.dumps(manifest))
    (folder / "_SUCCESS").touch()
    return folder


def write_tar(path: Path, members: list[tuple[str, bytes]], form: int = tarfile.PAX_FORMAT) -> Path:
    """A tar as other tools write it: names and order as given, fractional times (hence pax headers)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=form) as tar:
        for name, data in members:
            member = tarfile.TarInfo(name)
            member.size, member.mtime = len(data), 1700000000.25  # type: ignore[assignment]
            tar.addfile(member, io.BytesIO(data))
    return path


def write_foreign(folder: Path, pairs: list[tuple[bytes, str]], per_shard: int = 16) -> Path:
    """Tars in img2dataset's layout, without manifest or index."""
    folder.mkdir(parents=True)
    for start in range(0, len(pairs), per_shard):
        members = []
        for i, (image, caption) in enumerate(pairs[start : start + per_shard], start):
            about = json.dumps({"caption": caption, "key": f"{i:09d}"}).encode()
            members += [(f"{i:09d}.jpg", image), (f"{i:09d}.json", about), (f"{i:09d}.txt", caption.encode())]
        write_tar(folder / f"{start // per_shard:05d}.tar", members)
    return folder
