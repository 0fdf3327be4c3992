"""Our tar writer compared with the standard library, and the shards as read by other tools.

Readers that are not dependencies of the project: `test_readers.py`.
"""

from __future__ import annotations

import io
import json
import re
import tarfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import webdataset as wds
import wids
from torch.utils.data import DataLoader

from pipeline.stages.write_shards import _readable, _Tar, _tar_header
from tests.stages import finished


@pytest.mark.parametrize("sizes", [(0,), (1, 511, 512, 513), (28_000, 3_000_000, 0)])
def test_a_tar_is_byte_for_byte_what_the_standard_library_writes(sizes: tuple[int, ...]) -> None:
    ours, theirs = io.BytesIO(), io.BytesIO()
    tar = _Tar(ours)
    with tarfile.open(fileobj=theirs, mode="w", format=tarfile.USTAR_FORMAT) as reference:
        for number, size in enumerate(sizes):
            data = bytes(i % 251 for i in range(size))
            member = tarfile.TarInfo(f"{number:09d}.jpg")
            member.size = size
            reference.addfile(member, io.BytesIO(data))
            offset, length = tar.add(member.name, data)
            assert ours.getvalue()[offset : offset + length] == data
    tar.close()
    assert ours.getvalue() == theirs.getvalue()
    assert tar.offset == len(theirs.getvalue())


@pytest.mark.parametrize(("name", "size"), [(b"1" * 101, b"%011o" % 1), (b"1.jpg", b"%011o" % 8**11)])
def test_names_and_sizes_too_large_for_a_header_are_refused(name: bytes, size: bytes) -> None:
    with pytest.raises(ValueError, match="does not fit into a tar header"):
        _tar_header(name, size)


# --- Other readers ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return finished.write(tmp_path_factory.mktemp("run") / "shards")


def expected_captions() -> list[str]:
    return finished.rows()["caption"].to_pylist()


def snippet(folder: Path, package: str) -> str:
    """The code block of the card for a package."""
    blocks = re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.DOTALL)
    (block,) = [block for block in blocks if f"import {package}" in block]
    return block


def test_equal_rows_are_equal_bytes_in_every_file(folder: Path, tmp_path: Path) -> None:
    again = finished.write(tmp_path / "elsewhere")
    assert {p.name: p.read_bytes() for p in again.iterdir()} == {p.name: p.read_bytes() for p in folder.iterdir()}


def test_every_json_is_strict_and_has_the_same_keys(folder: Path) -> None:
    seen = set()
    for sample in wds.WebDataset(sorted(map(str, folder.glob("*.tar"))), shardshuffle=False):
        found = json.loads(sample["json"], parse_constant=pytest.fail)
        seen.add(tuple(found))
        assert found["key"] == sample["__key__"]
        assert found["phash"] is None or re.fullmatch(r"[0-9a-f]{16}", found["phash"])
    assert len(seen) == 1


def test_tables_have_all_columns(folder: Path) -> None:
    table = pa.concat_tables(pq.read_table(path) for path in sorted(folder.glob("*.parquet")))
    rows = finished.rows()
    for name in ("uid", "phash", "serial", "vector", "raw", "price", "taken", "boxes", "info"):
        assert table[name].type == rows[name].type
        assert repr(table[name].to_pylist()) == repr(rows[name].to_pylist())  # NaN is not equal to itself
    assert table["tags"].type == pa.list_(pa.struct([("key", pa.string()), ("value", pa.float32())]))
    assert table["long price"].to_pylist()[:2] == ["9" * 40 + ".00", None]
    assert [pair["key"] for pair in table["tags"].to_pylist()[0]] == ["cat"]


def test_invalid_text_in_a_column_does_not_make_a_table_unreadable() -> None:
    words = pa.array([b"fine", b"a\xff", None], pa.binary()).view(pa.string())
    lists = pa.ListArray.from_arrays(pa.array([0, 1, 3, None, 3], pa.int32()), words)
    pairs = pa.StructArray.from_arrays([pa.array([1, 2, 3, 4]), lists], ["n", "words"])
    table = pa.table({"number": [1, 2, 3, 4], "words": lists, "pairs": pairs}).slice(1)
    found = _readable(table)
    found.validate(full=True)
    assert found.schema == table.schema
    mended = [["a\ufffd", None], [], None]
    assert found["words"].to_pylist() == mended
    assert found["pairs"].to_pylist() == [{"n": n, "words": words} for n, words in zip((2, 3, 4), mended)]


def test_webdataset_feeds_a_dataloader(folder: Path) -> None:
    samples = wds.WebDataset(sorted(map(str, folder.glob("*.tar"))), shardshuffle=False).decode("torchrgb8")
    pairs = list(DataLoader(samples.to_tuple("jpg", "txt", "json"), batch_size=None, num_workers=1))
    assert [caption for _, caption, _ in pairs] == expected_captions()
    assert [tuple(image.shape) for image, _, _ in pairs] == [(3, 24, 32 + i) for i in range(finished.SAMPLES)]
    assert pairs[0][2]["unsafe"] is None


def test_wids_finds_samples_by_number(folder: Path) -> None:
    samples = wids.ShardListDataset(str(folder / "wids.json"), localname=str, transformations=[])
    assert [samples[i][".txt"].read().decode() for i in range(len(samples))] == expected_captions()
    samples.close()


@pytest.mark.parametrize("package", ["webdataset", "wids"])
def test_the_snippets_of_the_card_run(folder: Path, package: str, monkeypatch: pytest.MonkeyPatch, capsys) -> None:  # type: ignore[no-untyped-def]
    monkeypatch.chdir(folder)
    before = sorted(folder.iterdir())
    exec(snippet(folder, package), {})
    assert "number" in capsys.readouterr().out
    assert sorted(folder.iterdir()) == before


def test_datacomps_resharder_finds_every_sample_once(folder: Path) -> None:
    # A copy of its algorithm, since it has no package: sizes.json lists the shards, uids are looked up in the subset.
    sizes = json.loads((folder / "sizes.json").read_text())
    subset = np.load(folder / "subset.npy", mmap_mode="r")
    assert subset.dtype == np.dtype("u8,u8")
    found = []
    for number in range(len(sizes)):
        name = f"{number:05d}.tar"
        samples = list(wds.WebDataset(str(folder / name), shardshuffle=False))
        assert len(samples) == sizes[name]
        for sample in samples:
            uid = np.array([divmod(int(json.loads(sample["json"])["uid"], 16), 2**64)], np.dtype("u8,u8"))[0]
            low, high = (np.searchsorted(subset, uid, side) for side in ("left", "right"))
            found.append(int(high - low))
    assert found == [1] * finished.SAMPLES == [1] * len(subset)
