"""Training configuration: YAML plus `key=value` overrides, fully checked before anything starts."""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trainer.errors import InputError
from trainer.spelling import did_you_mean
from trainer.yamlfile import Document

PRECISIONS = ("fp32", "bf16", "fp16")
"""Names of the floating-point types to compute in; `trainer.model.DTYPES` has the types."""


class ConfigError(InputError):
    """All problems of a configuration, one line each.

    `source` is the file or option that has them, or empty if each problem names its own.
    """

    def __init__(self, source: str, problems: list[str]) -> None:
        super().__init__("\n".join(f"{source}: {problem}" if source else problem for problem in problems))
        self.source, self.problems = source, problems

    def __reduce__(self) -> tuple[type, tuple[str, list[str]]]:
        return type(self), (self.source, self.problems)  # pickled from a Ray worker to the driver


def option(doc: str, default: Any = dataclasses.MISSING) -> Any:
    return dataclasses.field(default=default, metadata={"doc": doc})


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """The keys of `conf/train_*.yaml`. Values without a default must be given.

    Defaults are those of CLIP (Radford et al. 2021, appendix F) wherever the paper has one.
    """

    shards: str | Sequence[Any] = option(
        "a run, a folder of tars, a pattern of tars, also as s3://… or gs://…; or a list of {path: …, weight: …}"
    )
    output: str = option("folder for checkpoints/, metrics.jsonl and model/")
    model: str = option("architecture: a name from open_clip or trainer/configs/")
    lr: float = option("peak learning rate")
    subset: str | None = option("an .npy file of sample numbers, int64: train on only these samples of `shards`", None)
    pretrained: str | None = option("weights to start from: an open_clip tag, a file, or an exported folder", None)
    lock_image: bool = option("freeze the image tower at its `pretrained` weights (LiT)", False)
    lock_text: bool = option("freeze the text tower at its `pretrained` weights", False)
    loss: str = option("clip, or siglip for a sigmoid over each pair", "clip")
    batch_size: int = option("samples per step", 32768)
    epochs: int = option("passes over the shards; the incomplete last batch of each is dropped", 32)
    samples: int | None = option("samples to train on, instead of `epochs`; a smaller dataset is repeated", None)
    warmup: int = option("steps of linear warm-up; then the cosine falls to 0 at the last step", 2000)
    weight_decay: float = option("AdamW's decay; gains, biases and the temperature are never decayed", 0.2)
    beta1: float = option("AdamW's β1", 0.9)
    beta2: float | None = option("AdamW's β2; by default 0.98 for a ViT and 0.999 for a ResNet", None)
    eps: float | None = option("AdamW's ε; by default 1e-6 for a ViT and 1e-8 for a ResNet", None)
    seed: int = option("seeds the initial weights, the sample order and the crops", 0)
    precision: str = option(
        "fp32, or bf16 or fp16 for autocast over fp32 weights; auto picks the fastest safe type for the device", "auto"
    )
    micro_batch_size: int | None = option(
        "samples per forward pass of a rank, by gradient caching (default: all)", None
    )
    grad_checkpointing: bool = option("recompute activations in the backward pass: slower, far less memory", False)
    compile: bool = option("torch.compile: takes minutes to start, pays off on a GPU", False)
    ranks: int | None = option("training processes to start on Ray; by default this process or torchrun's", None)
    device: str = option("cpu, cuda, cuda:1, ...; auto takes a GPU if there is one", "auto")
    threads: int | None = option("CPU threads of the training process; by default PyTorch's choice", None)
    workers: int = option("processes per rank that read and decode; 0 decodes in the training process", 2)
    checkpoint_every: int = option("steps between checkpoints; the last step always writes one", 1000)
    keep_checkpoints: int = option("newest checkpoints kept", 2)
    log_every: int = option("steps between lines of metrics.jsonl, and of the screen without a terminal", 10)
    tensorboard: bool = option("write output/tensorboard too", False)
    wandb: str | None = option("Weights & Biases project that also receives the metrics", None)
    evaluate: Sequence[Any] | None = option(
        "tasks to run during training: a list of {TASK: {data: …, every: STEPS, …}}, options as of trainer.evaluate",
        None,
    )
    resume: str = option("latest (or start if there is none), none, or the path of a checkpoint", "latest")
    export: bool = option("write output/model for open_clip at the end", True)

    def steps(self, per_epoch: int) -> int:
        """Total updates, for a dataset of `per_epoch` batches."""
        return per_epoch * self.epochs if self.samples is None else self.samples // self.batch_size

    def problems(self) -> Iterator[str]:
        """Yields a message for each invalid value."""
        for key, (least, most) in _WHOLE.items():
            if (value := getattr(self, key)) is not None and not least <= value <= most:
                expected = f"at least {least}" if value < least else f"at most {most:,}"
                yield f"{key}: found {_shown(value)}, expected {expected}"
        if not 0 <= self.weight_decay < math.inf:
            yield f"weight_decay: found {self.weight_decay}, expected a number from 0"
        for key in ("lr", "eps"):
            if (value := getattr(self, key)) is not None and not 0 < value < math.inf:
                yield f"{key}: found {value}, expected a number above 0"
        for key in ("beta1", "beta2"):
            if (value := getattr(self, key)) is not None and not 0 <= value < 1:
                yield f"{key}: found {value}, expected a number from 0 to below 1"
        if self.samples is not None and self.samples < self.batch_size:
            yield f"samples: found {self.samples}, expected at least batch_size ({self.batch_size}), or null"
        if self.ranks is not None and self.ranks > 0 and self.batch_size % self.ranks:
            yield f"batch_size: found {self.batch_size}, expected a multiple of ranks ({self.ranks})"
        if not self.output or "://" in self.output or not self.output.isprintable():
            yield f"output: found {_shown(self.output)}, expected a local folder, as in runs/first"
        if self.precision not in ("auto", *PRECISIONS):
            yield f"precision: found {self.precision!r}, expected auto, fp32, bf16 or fp16"
        if self.loss not in ("clip", "siglip"):
            yield f"loss: found {self.loss!r}, expected clip or siglip"
        if (self.lock_image or self.lock_text) and self.pretrained is None:
            yield "lock_image, lock_text: a locked tower never learns, so it needs weights: set pretrained"
        if self.lock_image and self.lock_text:
            yield "lock_image, lock_text: with both towers locked, nothing is left to train"


# Range of each whole number. The upper bounds are far beyond any real use; they keep a typing error from starting a
# million processes or overflowing the arithmetic of steps and samples.
_WHOLE = {
    "batch_size": (1, 1 << 30),
    "epochs": (1, 10**6),
    "samples": (1, 10**15),
    "warmup": (0, 10**12),
    "seed": (0, (1 << 63) - 1),
    "micro_batch_size": (1, 1 << 30),
    "ranks": (1, 10**6),
    "threads": (1, 1024),
    "workers": (0, 1024),
    "checkpoint_every": (1, 10**12),
    "keep_checkpoints": (1, 10**6),
    "log_every": (1, 10**12),
}

# Keys that may change on resume: they do not affect weights, except through the order in which floats are added.
# (Batch norm and dropout do depend on how a batch is divided into ranks and micro-batches.)
FREE_ON_RESUME = {
    *("shards", "subset", "output", "device", "workers", "checkpoint_every", "keep_checkpoints", "log_every", "resume"),
    *("export", "grad_checkpointing", "compile", "threads", "ranks", "micro_batch_size", "tensorboard"),
    *("wandb", "evaluate"),
}


def load_config(path: str | Path, overrides: Iterable[str] = ()) -> TrainConfig:
    """Reads a YAML file and applies `key=value` overrides. Raises ConfigError with all problems."""
    source = str(path)
    document = Document.read(path)
    values = {} if document.data is None else document.data
    if document.problems:
        raise ConfigError("", document.problems)
    if not isinstance(values, dict):
        raise ConfigError(source, [f"expected lines of `key: value`, found a {type(values).__name__}"])

    problems: list[str] = []
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals:
            problems.append(f"{override!r}: expected key=value")
            continue
        value = Document(text)
        problems += [f"{override!r}: {problem}" for problem in value.problems]
        values[key] = value.data

    fields = {field.name: field for field in dataclasses.fields(TrainConfig)}
    accepted = {}
    for key, value in values.items():
        if key not in fields:
            problems.append(f"{key}: no such key{did_you_mean(key, fields)}")
        else:
            try:
                accepted[key] = _coerce(value, str(fields[key].type))
            except ValueError as error:
                problems.append(f"{key}: {error}")
    for name, field in fields.items():
        if field.default is dataclasses.MISSING and name not in values:
            problems.append(f"{name}: missing ({field.metadata['doc']})")
    if not problems:
        config = TrainConfig(**accepted)
        problems.extend(config.problems())
    if problems:
        raise ConfigError(source, problems)
    return config


def describe() -> str:
    """The keys with their defaults and meaning, for `--help`."""
    lines = []
    for field in dataclasses.fields(TrainConfig):
        required = field.default is dataclasses.MISSING
        default = "required" if required else "null" if field.default is None else str(field.default).lower()
        lines.append(f"  {field.name:<20} {default:<9} {field.metadata['doc']}")
    return "\n".join(lines)


def _coerce(value: Any, kind: str) -> Any:
    expected = kind.removesuffix(" | None")
    if value is None and expected != kind:
        return None
    number = isinstance(value, int | float) and not isinstance(value, bool)
    plain: dict[str, type | tuple[type, ...]] = {
        "str": str, "str | Sequence[Any]": (str, list), "Sequence[Any]": list, "bool": bool
    }  # fmt: skip
    if isinstance(value, plain.get(expected, ())):
        return value
    if expected == "float" and number:
        with contextlib.suppress(OverflowError):
            return float(value)
    if expected == "int" and number and (isinstance(value, int) or value.is_integer()):
        return int(value)
    words = {"str": "text", "bool": "true or false", "int": "a whole number", "float": "a number"}
    unquoted = expected.startswith("str") and not isinstance(value, list | dict)
    hint = "; put it in quotes if it is text" if unquoted else ""
    raise ValueError(f"found {_shown(value)}, expected {words.get(expected.partition(' ')[0], 'a list')}{hint}")


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:80]}…"
