"""Labelled pictures: folders of classes, or CLIP_benchmark's WebDataset layout."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from trainer.samples import (
    EvaluationError,
    Sample,
    image_files,
    lines,
    read_file,
    read_lines,
    read_text,
    read_webdataset,
    webdataset_shards,
)


@dataclass
class LabelledImages:
    """One split of a labelled dataset: `names[label]` is the class of each sample that iteration yields."""

    folder: Path
    names: list[str]
    templates: list[str] | None
    """Prompt templates with `{c}` for the class, if the dataset has its own."""
    shards: list[Path]
    """Tars of `KEY.jpg` and `KEY.cls`; empty if the pictures are `folder/CLASS/*.jpg`."""
    folders: list[str]
    """The folders of classes, by label, if there are no tars."""

    def __iter__(self) -> Iterator[Sample]:
        if not self.shards:
            for label, name in enumerate(self.folders):
                for path in image_files(self.folder / name):
                    yield read_file(path, label)
        for shard in self.shards:
            for where, encoded, number in read_webdataset(shard, "cls"):
                try:
                    label = int(number)
                except ValueError as error:
                    raise EvaluationError(f"{where}: .cls is {number[:20]!r}, expected a whole number") from error
                if not 0 <= label < len(self.names):
                    raise EvaluationError(f"{where}: class {label}, but there are {len(self.names)} class names")
                yield Sample(where, encoded, label)

    def count(self) -> int | None:
        """The number of samples, or None if it is known only after reading the tars."""
        return None if self.shards else sum(len(image_files(self.folder / name)) for name in self.folders)


def open_labelled(folder: Path, classnames: list[str] | None = None, split: str = "test") -> LabelledImages:
    """Opens `folder`, or `folder/split` if there is one, in either layout.

    Class names are `classnames`, else `folder/classnames.txt`, else the names of the class folders (`_` is a space).
    Raises EvaluationError if there is nothing to evaluate on, or if names and classes differ in number.
    """
    if not folder.is_dir():
        raise EvaluationError(f"{folder}: {'not a folder' if folder.exists() else 'no such folder'}")
    if (kind := lines(folder / "dataset_type.txt")) and kind[0].lower() != "classification":
        raise EvaluationError(f"{folder / 'dataset_type.txt'}: {kind[0]}, expected a classification dataset")
    own = folder / "classnames.txt"
    names = classnames or (_names(own) if own.exists() else None)
    templates = lines(folder / "zeroshot_classification_templates.txt")
    inner = folder / split
    # A folder of that name may also be a class; then it has pictures, and no shards or classes.
    place = inner if inner.is_dir() and (any(inner.glob("*.tar")) or _classes(inner)) else folder
    if shards := webdataset_shards(place):
        if not names:
            raise EvaluationError(f"{folder}: no classnames.txt beside the shards; give --classnames FILE")
        return LabelledImages(place, names, templates, shards, [])
    folders = _classes(place)
    if not folders:
        raise EvaluationError(f"{folder} has neither CLASS/*.jpg (or .png, .webp) nor *.tar with KEY.cls")
    if empty := sorted(set(_folders(place)) - set(folders)):
        raise EvaluationError(
            f"{place / empty[0]}: it has no pictures, and without this class the result would not be comparable"
        )
    for name in folders:
        for sub in _folders(place / name):
            if below := image_files(place / name / sub):
                raise EvaluationError(
                    f"{below[0]}: in a folder below the class {name!r}, which is not read; move it up"
                )
    if names and len(names) != len(folders):
        raise EvaluationError(f"{place}: {len(names)} class names for {len(folders)} folders of classes")
    return LabelledImages(place, names or [f.replace("_", " ") for f in folders], templates, [], folders)


def read_classnames(value: str | None) -> list[str] | None:
    """The class names of `--classnames`: a file, `imagenet`, or None."""
    if value == "imagenet":
        from trainer.model import open_clip

        return list(open_clip.IMAGENET_CLASSNAMES)
    return _names(Path(value)) if value is not None else None


def _names(path: Path) -> list[str]:
    """Class names, one per line. Raises EvaluationError on an empty line, which would renumber the later classes."""
    names = read_lines(path)
    for number, line in enumerate(read_text(path).rstrip().split("\n"), 1):
        if not line.strip():
            raise EvaluationError(f"{path}:{number}: an empty line; expected the name of class {number - 1}")
    return names


def read_templates(value: str) -> list[str]:
    """The templates of `--templates`: a file, or `imagenet`. Raises EvaluationError."""
    if value == "imagenet":
        from trainer.model import open_clip

        return [template("{c}") for template in open_clip.OPENAI_IMAGENET_TEMPLATES]
    return read_lines(Path(value))


def _classes(folder: Path) -> list[str]:
    return [name for name in _folders(folder) if image_files(folder / name)]


def _folders(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))
