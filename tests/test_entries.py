from __future__ import annotations

import gzip
import json
from collections import Counter
from itertools import pairwise
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline import entries
from pipeline.text.matching import read_entries


def rows(path: Path) -> dict[str, dict[str, str]]:
    header, *lines = path.read_text().splitlines()
    names = header.split("\t")
    found = [dict(zip(names, line.split("\t"), strict=True)) for line in lines]
    assert [row["entry"] for row in found] == sorted(row["entry"] for row in found)
    return {row.pop("entry"): {name: value for name, value in row.items() if value} for row in found}


@pytest.fixture
def wordnet(tmp_path: Path) -> str:
    synsets = {
        "noun": ["00001740 03 n 01 physical_entity 0 000 | it", "00001930 03 n 02 dog 0 domestic_dog 0 000 | a dog"],
        "verb": ["00001740 29 v 01 breathe 0 000 | to"],
        "adj": ["00001740 00 s 01 galore(ip) 0 000 | many"],
        "adv": [],
    }
    folder = tmp_path / "dict"
    folder.mkdir()
    for part, lines in synsets.items():
        (folder / f"data.{part}").write_text("\n".join(["  1 License.  ", *lines, ""]))
    return str(folder)


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    rng = np.random.default_rng(0)
    words = np.array([f"w{i}" for i in range(300)])
    lines = []
    for i in range(2000):
        line = list(rng.choice(words, 12, p=1 / np.arange(1, 301) / sum(1 / np.arange(1, 301))))
        lines.append(" ".join([*line, "Hot DOG!"] if i % 10 == 0 else line))
    path = tmp_path / "corpus.txt"
    path.write_text("\ufeff" + "\n".join(lines) + "\n")
    return path


def test_a_corpus_gives_its_words_and_collocations(corpus: Path, tmp_path: Path, monkeypatch) -> None:
    lines = [line.replace("Hot DOG!", "hot dog").split() for line in corpus.read_text("utf-8-sig").splitlines()]
    words = Counter(word for line in lines for word in line)
    pairs = Counter(pair for line in lines for pair in pairwise(line))
    expected = {word: {"word_count": str(n)} for word, n in words.items() if n >= 100}
    for (a, b), n in pairs.items():
        pmi = n * words.total() / (words[a] * words[b])
        if n >= 100 and pmi >= 30:
            expected[f"{a} {b}"] = {"pair_count": str(n), "pmi": str(round(pmi, 1))}
    assert "hot dog" in expected
    outputs = set()
    # Neither the size of blocks nor the number of partitions may change a byte.
    for block, partition in [(8 << 20, 256 << 20), (1 << 14, 1 << 13), (997, 1 << 15)]:
        monkeypatch.setattr(entries, "BLOCK_BYTES", block)
        monkeypatch.setattr(entries, "BYTES_PER_PARTITION", partition)
        out = tmp_path / "out.tsv"
        assert entries.main([str(out), "--corpus", str(corpus)]) == 0
        assert rows(out) == expected
        outputs.add(out.read_bytes() + (tmp_path / "out.tsv.sources.json").read_bytes())
    assert len(outputs) == 1


def test_a_line_longer_than_a_block_is_cut_between_words(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(entries, "BLOCK_BYTES", 64)
    path = tmp_path / "long.txt"
    path.write_text("gelöst wörter " * 500)
    assert entries.main([str(tmp_path / "out.tsv"), "--corpus", str(path)]) == 0
    assert rows(tmp_path / "out.tsv") == {"gelöst": {"word_count": "500"}, "wörter": {"word_count": "500"}}


def test_each_entry_says_where_it_comes_from(tmp_path: Path, wordnet: str, capsys) -> None:
    (tmp_path / "views.tsv").write_text("Dog\t40\nThe_Beatles\t69\r\ndog\t30\nThe Beatles\t1\nRare\t3\n\n!\t99\n")
    pool = pa.table({"text": ["A dog!"] * 3 + [None, "the dog"]})
    pq.write_table(pool, tmp_path / "pool.parquet")
    out = tmp_path / "out.tsv"
    words = [
        "--titles",
        str(tmp_path / "views.tsv"),
        "--wordnet",
        wordnet,
        "--captions",
        str(tmp_path / "pool.parquet"),
    ]
    assert entries.main([str(out), *words, "--caption-column", "text", "--min-count", "3", "--min-pmi", "1"]) == 0
    assert rows(out) == {
        "a": {"word_count": "3"},
        "a dog": {"pair_count": "3", "pmi": "2.0"},  # 3 · 8 / (3 · 4)
        "breathe": {"wordnet": "1"},
        "dog": {"wordnet": "1", "word_count": "4", "views": "70"},
        "galore": {"wordnet": "1"},
        "physical entity": {"wordnet": "1"},
        "the beatles": {"views": "70"},
    }
    assert read_entries(str(out)) == tuple(rows(out))
    sources = json.loads((tmp_path / "out.tsv.sources.json").read_text())["sources"]
    assert [(s["source"], s["entries"], s["new"]) for s in sources] == [
        ("wordnet", 4, 4), ("captions", 3, 2), ("titles", 2, 1),
    ]  # fmt: skip
    assert sources[2]["files"] == [{"path": str(tmp_path / "views.tsv"), "bytes": 57}]
    assert "7 entries" in capsys.readouterr().out


@pytest.mark.parametrize("ending", [".gz", ".zst"])
def test_sources_and_the_list_may_be_compressed(tmp_path: Path, ending: str) -> None:
    text = ("red car\n" * 100).encode()
    data = gzip.compress(text) if ending == ".gz" else pa.compress(text, "zstd", asbytes=True)
    (tmp_path / f"c.txt{ending}").write_bytes(data)
    out = tmp_path / f"out.tsv{ending}"
    assert entries.main([str(out), "--corpus", str(tmp_path / f"c.txt{ending}"), "--min-pmi", "2"]) == 0
    assert read_entries(str(out)) == ("car", "red", "red car")


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        (["out.tsv"], "expected a source"),
        (["out.json", "--corpus", "c.txt"], "expected a name in .tsv"),
        (["out.tsv", "--corpus", "c.txt", "--min-count", "0"], "--min-count: must be above 0"),
        (["out.tsv", "--corpus", "no.txt"], "no.txt: no such file"),
        (["out.tsv", "--corpus", "c.txt"], "no source has an entry above the thresholds"),
        (["out.tsv", "--corpus", "latin1.txt"], "latin1.txt: expected UTF-8, found b'\\xe9' near byte 3"),
        (["out.tsv", "--corpus", "cut.txt.gz"], "cut.txt.gz: cannot be read"),
        (["out.tsv", "--titles", "c.txt"], "c.txt:1: expected title, tab and number of views, found 'red car'"),
        (["out.tsv", "--titles", "negative.tsv"], "negative.tsv:2: expected title"),
        (["out.tsv", "--wordnet", "."], "data.noun: no such file"),
        (["out.tsv", "--captions", "none"], "none does not exist"),
        (["out.tsv", "--captions", "p.csv"], "p.csv has no column 'caption'; it has text"),
    ],
)
def test_bad_sources_are_reported(tmp_path: Path, monkeypatch, capsys, words: list[str], problem: str) -> None:
    monkeypatch.chdir(tmp_path)
    Path("c.txt").write_text("red car\n")
    Path("latin1.txt").write_bytes(b"caf\xe9 ")
    Path("negative.tsv").write_text("a\t3\nb\t-3\n")
    Path("cut.txt.gz").write_bytes(gzip.compress(b"cat dog " * 1000)[:-20])
    Path("p.csv").write_text("text\na cat\n")
    try:
        status = entries.main(words)
    except SystemExit as end:
        status = end.code
    assert status == 2
    assert problem in capsys.readouterr().err.replace("\n", " ")
    assert not Path("out.tsv").exists()


def test_a_bad_synset_is_reported(wordnet: str, tmp_path: Path, capsys) -> None:
    (Path(wordnet) / "data.adv").write_text("entity n 1\n")
    assert entries.main([str(tmp_path / "out.tsv"), "--wordnet", wordnet]) == 2
    assert "data.adv:1: expected a synset of WordNet, found 'entity n 1'" in capsys.readouterr().err
    (Path(wordnet) / "data.adv").write_bytes(b"00001740 03 n 01 caf\xe9 0 003 ~\n")
    assert entries.main([str(tmp_path / "out.tsv"), "--wordnet", wordnet]) == 2
    assert "data.adv: expected UTF-8, found b'\\xe9'" in capsys.readouterr().err
