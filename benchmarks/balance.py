"""Compares `match_entries`, `balance` and `language` with the libraries they call and with brute force.

    python benchmarks/balance.py [--captions 200000] [--rounds 3]
    python benchmarks/balance.py --sentences known.parquet --text text --truth lang

Draws words with Zipfian frequencies, makes 500,000 entries of one or two words each, and captions of 4 to 14 words.
`match_entries` is the whole step, including normalisation and the column of matches; `automaton` is ahocorasick_rs
alone, called once for each normalised caption; `substrings` is a loop over all entries with Python's `in`, timed on 20
captions. All run on one core, and rates count CPU time. The decisions of `balance` about 50,000 captions are compared
with a brute-force reference that looks phrases up in a set and computes each probability from the formula.

`language` is the whole step with `keep: [en]`; `fasttext` is lid.176 alone, called once for each caption in lower case
(given a list, the library returns no probabilities). Accuracy is measured for each language on the sentences of
`--sentences`, a table with a column of texts and one of true languages, or else on sentences of the demo.
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
"""Number of distinct words. The 300,000 most frequent ones are entries."""
CAP = 50
REFERENCE_CAPTIONS = 50_000
LOOP_CAPTIONS = 20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--captions", type=int, default=200_000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--sentences", type=Path, help="parquet file of texts and their languages")
    parser.add_argument("--text", default="text", help="its column of texts")
    parser.add_argument("--truth", default="lang", help="its column of true languages")
    args = parser.parse_args()
    entries, captions = entries_and_captions(args.captions)
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


def entries_and_captions(captions: int) -> tuple[tuple[str, ...], pa.Array]:
    """Draws ENTRIES entries and `captions` captions that contain them."""
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
    """Returns the median rate of each contender. They take turns, so that a change in machine speed affects all."""
    rates: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(rounds):
        for name, work in contenders.items():
            rates[name].append(rate(work, n))
    return {name: statistics.median(values) for name, values in rates.items()}


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
        for low in range(0, len(batch), 10_000):  # 10,000 rows are a unit
            step.process(batch.slice(low, 10_000))

    rates = fastest({"match_entries": ours, "automaton": bare}, len(captions), rounds)
    return rates | {"substrings": rate(loop, LOOP_CAPTIONS)}


def differences(entries: tuple[str, ...], captions: pa.Array) -> int:
    """Counts the captions for which `balance` differs from the reference in its decision or its probability."""
    step = Balance(column="entries", max_per_entry=CAP)
    n = len(captions)
    frame = pd.DataFrame({"unit": np.zeros(n, np.int32), "row": np.arange(n, dtype=np.int32)})
    frame["uid"] = pd.Series([f"{i:032x}" for i in range(n)], dtype="string[pyarrow]")
    frame["entries"] = pd.arrays.ArrowExtensionArray(Matcher(entries).match(normalised(captions)))
    with dask.config.set(scheduler="synchronous"):
        drops = step.decide(dd.from_pandas(frame, npartitions=3, sort=False)).compute().set_index("row")
    known = set(entries)
    matches = []
    for caption in captions.to_pylist():
        words = caption.lower().strip(".").split()
        matches.append({" ".join(words[i : i + k]) for k in (1, 2) for i in range(len(words) - k + 1)} & known)
    counts = Counter(itertools.chain.from_iterable(matches))
    u = uniform(frame["uid"], seed=0, purpose="balance")
    wrong = 0
    for row, matched in enumerate(matches):
        missed = 1.0
        for entry in matched:
            missed *= 1 - min(1.0, CAP / counts[entry])
        kept = bool(u[row] < 1 - missed)
        same = kept == (row not in drops.index)
        if same and not kept and matched:
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
    """Returns, for each language, the share of its sentences that are recognised."""
    step = Language(keep=None)
    step.setup()
    recognised = step.process(pa.table({"caption": texts}))["language"]
    right = pc.equal(recognised.combine_chunks(), pa.array(truth)).to_numpy(zero_copy_only=False)
    return {language: float(right[np.array(truth) == language].mean()) for language in set(truth)}


if __name__ == "__main__":
    main()
