"""Labelled images: a folder of classes, or CLIP_benchmark's WebDataset layout."""

from __future__ import annotations

import os
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from trainer.data import CorruptSampleError, decode

EXTENSIONS = (".jpg", ".jpeg", ".png", ".webp")


class EvaluationError(ValueError):
    """Data that cannot be evaluated on; the message names the file or folder."""


@dataclass
class LabelledImages:
    """A test set: `names[label]` is the class of each image that iteration yields as `(image, label)`."""

    folder: Path
    names: list[str]
    templates: list[str] | None
    """Prompt templates with `{c}` for the class, where the data brings its own."""
    shards: list[Path]
    """Tars of `KEY.jpg` and `KEY.cls`, or none: then `folder/CLASS/*.jpg`."""
    folders: list[str]

    def __iter__(self) -> Iterator[tuple[Image.Image, int]]:
        for where, encoded, label in self._from_shards() if self.shards else self._from_folders():
            if not 0 <= label < len(self.names):
                raise EvaluationError(f"{where}: class {label}, but there are {len(self.names)} class names")
            try:
                yield decode(encoded), label
            except CorruptSampleError as error:
                raise EvaluationError(f"{where}: {error}") from error

    def _from_folders(self) -> Iterator[tuple[str, bytes, int]]:
        for label, name in enumerate(self.folders):
            for path in _images(self.folder / name):
                yield str(path), path.read_bytes(), label

    def _from_shards(self) -> Iterator[tuple[str, bytes, int]]:
        for shard in self.shards:
            try:
                with tarfile.open(shard, "r:") as tar:
                    waiting: dict[str, dict[str, bytes]] = {}
                    for member in tar:
                        key, extension = os.path.splitext(member.name)
                        file = tar.extractfile(member) if member.isfile() else None
                        if file is None or extension not in (*EXTENSIONS, ".cls"):
                            continue
                        sample = waiting.setdefault(key, {})
                        sample["cls" if extension == ".cls" else "image"] = file.read()
                        if len(sample) == 2:
                            del waiting[key]
                            yield f"{shard}:{key}", sample["image"], int(sample["cls"])
            except (tarfile.TarError, ValueError) as error:
                raise EvaluationError(f"{shard}: {error}") from error
            if waiting:
                raise EvaluationError(f"{shard}: {next(iter(waiting))} has no image or no .cls beside it")


def open_labelled(folder: Path, classnames: list[str] | None) -> LabelledImages:
    """Finds out the layout of `folder`. Class names are `classnames`, else `folder/classnames.txt`, else the folders'.

    Raises EvaluationError if there is nothing to evaluate on, or if names and classes differ in number.
    """
    if not folder.is_dir():
        raise EvaluationError(f"--data: {folder} is not a folder")
    names = classnames or _lines(folder / "classnames.txt")
    templates = _lines(folder / "zeroshot_classification_templates.txt")
    shards = sorted((*folder.glob("*.tar"), *folder.glob("test/*.tar")), key=lambda p: (len(p.stem), p.stem))
    if shards:
        if not names:
            raise EvaluationError(f"{folder}: no classnames.txt beside the shards; give --classnames FILE")
        return LabelledImages(folder, names, templates, shards, [])
    folders = sorted(p.name for p in folder.iterdir() if p.is_dir() and _images(p))
    if not folders:
        raise EvaluationError(f"--data: {folder} has neither CLASS/*.jpg (or .png, .webp) nor *.tar with KEY.cls")
    if names and len(names) != len(folders):
        raise EvaluationError(f"{folder}: {len(names)} class names for {len(folders)} folders of classes")
    return LabelledImages(folder, names or [f.replace("_", " ") for f in folders], templates, [], folders)


def _images(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.suffix.lower() in EXTENSIONS)


def _lines(path: Path) -> list[str] | None:
    if not path.is_file():
        return None
    return [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]


def read_lines(path: Path) -> list[str]:
    """The lines of a text file that are not empty. Raises EvaluationError."""
    lines = _lines(path)
    if not lines:
        raise EvaluationError(f"{path}: no such file, or nothing in it")
    return lines
