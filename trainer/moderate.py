"""Content moderation by prompts: scores pictures for the labels of a policy, and names the prompt that matched.

    python -m trainer.moderate SOURCE --model ViT-L-14 --pretrained openai --policy conf/policy_example.yaml

SOURCE is a folder of shards, a folder of pictures, or one picture. Each picture gets a JSON line on standard output:
`image`, `flagged` (the labels whose threshold it reaches) and, by label, the `score` and the `prompt` that gave it. A
picture that cannot be read has `flagged: null` and the reason in `error`: it was not judged.

The policy is a YAML file:

    neutral: [a photo, a photo of everyday life]     # what harmless pictures look like
    labels:
      weapons:
        threshold: 0.8                               # from 0 to 1
        prompts: [a photo of a gun, a photo of a knife as a weapon]

A score is the model's probability for the label's best prompt against the best neutral one: a softmax of the two
cosines at the model's own temperature. 0.5 means equally near to both. Choose thresholds on your own labelled pictures,
for each model anew.
"""

from __future__ import annotations

import argparse
import io
import json
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from trainer import atomic
from trainer.command import add_model_arguments, open_encoder, say
from trainer.config import ConfigError
from trainer.samples import Sample, read_pictures
from trainer.terminal import entry_point
from trainer.yamlfile import Document

if TYPE_CHECKING:
    from torch import Tensor

    from trainer.features import Encoder


@dataclass
class Label:
    """A kind of content, the prompts that describe it, and the score (0 to 1) from which a picture is flagged."""

    threshold: float
    prompts: list[str]


@dataclass
class Policy:
    neutral: list[str]
    labels: dict[str, Label]


class Moderator:
    """A model and a policy, ready to score pictures."""

    def __init__(self, encoder: Encoder, policy: Policy) -> None:
        self.encoder, self.policy = encoder, policy
        self._scale = encoder.model.logit_scale.float().exp().item()
        if not math.isfinite(self._scale):
            raise ConfigError("--model", ["its temperature (logit_scale) is not a number: the weights are damaged"])
        self._neutral = encoder.texts(policy.neutral)
        self._prompts = {name: encoder.texts(label.prompts) for name, label in policy.labels.items()}

    def judge(self, images: Tensor) -> list[dict[str, Any]]:
        """`flagged` and `scores` for each unit vector (B, embed_dim)."""
        neutral = (images @ self._neutral.T).amax(dim=1)
        verdicts: list[dict[str, Any]] = [{"flagged": [], "scores": {}} for _ in images]
        for name, label in self.policy.labels.items():
            cosine, best = (images @ self._prompts[name].T).max(dim=1)
            scores = (self._scale * (cosine - neutral)).sigmoid()
            for verdict, score, prompt in zip(verdicts, scores.tolist(), best.tolist()):
                verdict["scores"][name] = {"score": round(score, 4), "prompt": label.prompts[prompt]}
                if score >= label.threshold:
                    verdict["flagged"].append(name)
        return verdicts


def read_policy(path: Path) -> Policy:
    """Reads a policy. Raises ConfigError with all problems."""
    document = Document.read(path)
    if document.problems:
        raise ConfigError("", document.problems)
    found, problems = document.data, []
    if not isinstance(found, dict) or set(found) != {"neutral", "labels"} or not isinstance(found["labels"], dict):
        raise ConfigError(str(path), ["expected the keys `neutral` (a list of prompts) and `labels`"])
    if not _prompts(found["neutral"]):
        problems.append("neutral: expected a list of prompts")
    if not found["labels"]:
        problems.append("labels: expected at least one")
    labels = {}
    for name, label in found["labels"].items():
        if not isinstance(label, dict) or set(label) != {"threshold", "prompts"} or not _prompts(label["prompts"]):
            problems.append(f"labels.{name}: expected `threshold` and `prompts`, a list of texts")
            continue
        threshold = label["threshold"]
        if isinstance(threshold, bool) or not isinstance(threshold, int | float) or not 0 <= threshold <= 1:
            problems.append(f"labels.{name}.threshold: found {threshold!r}, expected a number from 0 to 1")
        else:
            labels[name] = Label(float(threshold), label["prompts"])
    if problems:
        raise ConfigError(str(path), problems)
    return Policy(found["neutral"], labels)


def _prompts(value: object) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(prompt, str) for prompt in value)


def moderate(args: argparse.Namespace, out: TextIO) -> None:
    """Writes a line per picture, in the order of the source, except that unreadable pictures may come earlier."""
    policy = read_policy(args.policy)
    samples, total = read_pictures(args.source)
    moderator = Moderator(open_encoder(args), policy)
    unread = 0

    def corrupt(sample: Sample, why: str) -> None:
        nonlocal unread
        unread += 1
        out.write(json.dumps({"image": sample.where, "flagged": None, "error": why}, ensure_ascii=False) + "\n")

    flagged = dict.fromkeys(policy.labels, 0)
    for batch, vectors in moderator.encoder.images(samples, total, corrupt=corrupt):
        for sample, verdict in zip(batch, moderator.judge(vectors)):
            out.write(json.dumps({"image": sample.where, **verdict}, ensure_ascii=False) + "\n")
            for name in verdict["flagged"]:
                flagged[name] += 1
    counts = ", ".join(f"{name} {count:,}" for name, count in flagged.items())
    say(f"{total:,} pictures: {counts}" + (f"; {unread:,} could not be read" if unread else ""))


@entry_point
def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m trainer.moderate", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("source", help="shards, a folder of pictures, or a picture")
    parser.add_argument("--policy", type=Path, required=True, help="YAML file such as conf/policy_example.yaml")
    parser.add_argument("--output", type=Path, help="file for the lines, instead of standard output")
    add_model_arguments(parser)
    args = parser.parse_args(argv)
    if not args.output:
        moderate(args, sys.stdout)
        return
    # Atomic, because a truncated file would not show which pictures are missing.
    with atomic.replacing(args.output, parents=True) as file:
        # A byte of a file name that is not UTF-8 becomes an escape that JSON can read.
        text = io.TextIOWrapper(file, encoding="utf-8", errors="backslashreplace", write_through=True)
        moderate(args, text)
        text.detach()


if __name__ == "__main__":
    sys.exit(main())
