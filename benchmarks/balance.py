"""Matching captions against 500,000 entries, balancing by them, and recognising languages, beside the bare libraries.

    python benchmarks/balance.py [--captions 200000] [--rounds 3]
    python benchmarks/balance.py --sentences known.parquet --text text --truth lang

Makes words with Zipf's frequencies, 500,000 entries of one and two of them, and captions of 4 to 14. `match_entries` is
the whole step, normal form and column of matches included; `automaton` is ahocorasick_rs alone over the captions in
normal form, one after the other; `substrings` is a loop over all entries with Python's `in`, timed on 20 captions. All
use one core, and rates are by CPU time. The decisions of `balance` about 50,000 captions are compared with a
brute-force reference: dictionaries of phrases, and the probability that its entries keep a caption by their formula.

`language` is the whole step with `keep: [en]`; `fasttext` is lid.176 alone, on the same captions in lower case, one
after the other: for a list, the library returns no probabilities. Accuracy, by language, is on the table given: its
column of texts and its column of true languages. Without one, on sentences of the demo.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ahocorasick_rs
import dask
import dask.dataframe as dd
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipeline.demo.captions import LANGUAGES
from pipeline.filters.balance import Balance
from pipeline.stages.language import Language
from pipeline.stages.match_entries import MatchEntries
from pipeline.text.caption import normal
from pipeline.text.hashing import uniform
from pipeline.text.matching import Matcher, normalised

ENTRIES = 500_000
VOCABULARY = 400_000
"""Words, of which the 300,000 most frequent are entries."""
CAP = 50
REFERENCE_CAPTIONS = 50_000
LOOP_CAPTIONS = 20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--captions", type=int, default=200_000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--sentences", type=Path, help="parquet with texts and their languages")
    parser.add_argument("--text", default="text")
    parser.add_argument("--truth", default="lang")
    args = parser.parse_args()
    entries, captions = made(args.captions)
    rates = matching(entries, captions, args.rounds)
    wrong = differences(entries, captions.slice(0, REFERENCE_CAPTIONS))
    texts, truth = sentences(args.sentences, args.text, args.truth)
    rates |= recognising(texts, args.rounds)
    print(f"{len(entries):,} entries, {len(captions):,} captions; {len(texts):,} sentences; one core, by CPU time")
    print(f"{'contender':<16} {'captions/s':>12}")
    for name, rate in rates.items():
        print(f"{name:<16} {rate:>12,.0f}" + (f"   (from {LOOP_CAPTIONS} captions)" if name == "substrings" else ""))
    print(f"balance: {wrong} of {min(len(captions), REFERENCE_CAPTIONS):,} decisions differ from the reference")
    accuracy = by_language(texts, truth)
    print("accuracy: " + ", ".join(f"{language} {share:.1%}" for language, share in sorted(accuracy.items())))
    print(
        f"RESULT automaton_share={rates['match_entries'] / rates['automaton']:.2f} "
        f"loop_ratio={rates['match_entries'] / rates['substrings']:.0f} wrong_decisions={wrong} "
        f"language_share={rates['language'] / rates['fasttext']:.2f} accuracy={statistics.mean(accuracy.values()):.4f}"
    )


def made(captions: int) -> tuple[tuple[str, ...], pa.Array]:
    """Entries, and captions in which they occur."""
    rng = np.random.default_rng(0)
    letters = np.array(list("abcdefghijklmnopqrstuvwxyz"))
    lengths = rng.integers(3, 10, 2 * VOCABULARY)
    words = list(dict.fromkeys("".join(rng.choice(letters, n)) for n in lengths))[:VOCABULARY]
    weights = np.cumsum(1 / np.arange(10, VOCABULARY + 10))
    drawn = np.searchsorted(weights, rng.random(captions * 9 + 14) * weights[-1])
    ends = np.cumsum(rng.integers(4, 15, captions))
    bounds = [0, *ends[ends < len(drawn)].tolist()]
    lines = [" ".join(words[i] for i in drawn[low:high]) for low, high in itertools.pairwise(bounds)]
    singles = words[: ENTRIES * 3 // 5]
    pairs = {f"{words[a]} {words[b]}" for a, b in itertools.pairwise(drawn.tolist())}
    more = rng.integers(0, VOCABULARY, (ENTRIES, 2)).tolist()
    listed = dict.fromkeys([*singles, *sorted(pairs)[: ENTRIES // 5], *(f"{words[a]} {words[b]}" for a, b in more)])
    texts = [line.capitalize() + "." for line in lines[:captions]]
    return tuple(itertools.islice(listed, ENTRIES)), pa.array(texts, pa.string())


def rate(work: Callable[[], Any], n: int) -> float:
    started = time.process_time()
    work()
    return n / (time.process_time() - started)


def fastest(contenders: dict[str, Callable[[], Any]], n: int, rounds: int) -> dict[str, float]:
    """The median rate of each; the rounds alternate, since the machine's speed wanders."""
    found: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(rounds):
        for name, work in contenders.items():
            found[name].append(rate(work, n))
    return {name: statistics.median(values) for name, values in found.items()}


def matching(entries: tuple[str, ...], captions: pa.Array, rounds: int) -> dict[str, float]:
    step = MatchEntries(entries="-")
    step._matchers = {"": Matcher(entries)}
    batch = pa.table({"caption": captions})
    automaton = ahocorasick_rs.AhoCorasick([f" {entry} " for entry in entries], store_patterns=False)
    lines = [f" {caption} " for caption in normalised(captions).to_pylist()]

    def bare() -> None:
        for line in lines:
            automaton.find_matches_as_indexes(line, overlapping=True)

    def loop() -> None:
        padded = [f" {entry} " for entry in entries]
        for line in lines[:LOOP_CAPTIONS]:
            [entry for entry in padded if entry in line]

    def ours() -> None:
        for low in range(0, len(batch), 10_000):  # a unit
            step.process(batch.slice(low, 10_000))

    rates = fastest({"match_entries": ours, "automaton": bare}, len(captions), rounds)
    return rates | {"substrings": rate(loop, LOOP_CAPTIONS)}


def differences(entries: tuple[str, ...], captions: pa.Array) -> int:
    """The number of captions that `balance` judges otherwise than the reference, or by another probability."""
    step = Balance(column="entries", max_per_entry=CAP)
    n = len(captions)
    frame = pd.DataFrame({"unit": np.zeros(n, np.int32), "row": np.arange(n, dtype=np.int32)})
    frame["uid"] = pd.Series([f"{i:032x}" for i in range(n)], dtype="string[pyarrow]")
    frame["entries"] = pd.arrays.ArrowExtensionArray(Matcher(entries).match(normalised(captions)))
    with dask.config.set(scheduler="synchronous"):
        drops = step.decide(dd.from_pandas(frame, npartitions=3, sort=False)).compute().set_index("row")
    known = set(entries)
    found = []
    for caption in captions.to_pylist():
        words = caption.lower().strip(".").split()
        found.append({" ".join(words[i : i + k]) for k in (1, 2) for i in range(len(words) - k + 1)} & known)
    counts = Counter(entry for some in found for entry in some)
    u = uniform(frame["uid"], seed=0, purpose="balance")
    wrong = 0
    for row, some in enumerate(found):
        missed = 1.0
        for entry in some:
            missed *= 1 - min(1.0, CAP / counts[entry])
        kept = bool(u[row] < 1 - missed)
        same = kept == (row not in drops.index)
        if same and not kept and some:
            same = bool(np.isclose(drops.loc[row, "value"], 1 - missed, rtol=1e-9))
        wrong += not same
    return wrong


def sentences(path: Path | None, text: str, truth: str) -> tuple[pa.Array, list[str]]:
    if path is not None:
        table = pq.read_table(path, columns=[text, truth]).combine_chunks()
        return table[text].combine_chunks(), table[truth].to_pylist()
    texts, languages = [], []
    for language, parts in LANGUAGES.items():
        for template, shape, colour, place in itertools.product(
            parts["templates"], *(parts[kind].values() for kind in ("shapes", "colours", "places"))
        ):
            texts.append(template.format(shape=shape, colour=colour, place=place))
            languages.append(language)
    return pa.array(texts, pa.string()), languages


def recognising(texts: pa.Array, rounds: int) -> dict[str, float]:
    step = Language(keep=["en"])
    step.setup()
    batch = pa.table({"caption": texts})
    lower = [text.lower() for text in normal(texts).to_pylist()]

    def bare() -> None:
        for text in lower:
            step._model.predict(text)

    return fastest({"language": lambda: step.process(batch), "fasttext": bare}, len(texts), rounds)


def by_language(texts: pa.Array, truth: list[str]) -> dict[str, float]:
    """The share of the sentences of each language that is recognised."""
    step = Language(keep=None)
    step.setup()
    found = step.process(pa.table({"caption": texts}))["language"]
    right = pc.equal(found.combine_chunks(), pa.array(truth)).to_numpy(zero_copy_only=False)
    return {language: float(right[np.array(truth) == language].mean()) for language in set(truth)}


if __name__ == "__main__":
    main()
