"""Runs from shards of img2dataset, DataComp and our own, and damaged ones."""

from __future__ import annotations

import gzip
import io
import json
import re
import tarfile
from pathlib import Path
from typing import Any

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from pipeline.stages.download import Download
from pipeline.stages.read_shards import Folder, ReadShards
from pipeline.stages.write_shards import WriteShards
from pipeline.storage import Store
from tests.conftest import Command
from tests.fetch.img2dataset_jobs import write_folders
from tests.fetch.server import answer, jpeg, serving
from tests.tables import make_batch, run_step, verdicts

PICTURES = {f"{n}": answer(body=jpeg(100 + 20 * n, 90, seed=n)) for n in range(20)}
BAD = {
    "down": answer("503 Service Unavailable", b""),
    "html": answer(body=b"<html>"),
    "gone": answer("404 Not Found", b""),
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`laion`: three shards of 10, with some failed rows; `datacomp`: names of 8 digits, and its own uids."""
    root = tmp_path_factory.mktemp("folders")
    names = [*PICTURES, *BAD]
    with serving({**PICTURES, **BAD}) as server:
        columns = {"url": [f"{server.url}/{n}" for n in names], "caption": [f"picture number {n}" for n in names]}
        uids = {"uid": [f"{n:032x}" for n in range(len(names))]}
        write_folders(
            [
                {"folder": str(root / "laion"), "columns": columns, "number_sample_per_shard": 10, "image_size": 64},
                {
                    "folder": str(root / "datacomp"),
                    "columns": {**columns, **uids},
                    "oom_shard_count": 8,
                    "resize_mode": "keep_ratio_largest",
                    "resize_only_if_bigger": True,
                },
            ]
        )
    return root


def step(path: Path | str, tmp_path: Path, **options: Any) -> ReadShards:
    return ReadShards(path=str(path), index=str(tmp_path / "index"), **options)


def tables(folder: Path) -> pa.Table:
    return pa.concat_tables([pq.read_table(path) for path in sorted(folder.glob("*.parquet"))])


def test_it_adds_the_columns_of_download() -> None:
    assert {**ReadShards.adds, "usage": pa.string()} == Download.adds


def test_every_row_of_a_folder_has_an_image_or_a_reason(folders: Path, tmp_path: Path) -> None:
    published = tables(folders / "laion").to_pylist()
    rows = [{"key": row["key"], "caption": row["caption"]} for row in published]
    rows += [{"key": key} for key in ("000000017", "000000999", "x/../../etc", "٣", "", None, "9" * 5000)]
    batch = make_batch(rows)
    kept, drops = run_step(step(folders / "laion", tmp_path), batch)
    by_name = {row["url"].rsplit("/", 1)[-1]: row for row in published}
    expected = {"down": "http_503", "html": "decode_error", "gone": "http_404"}
    names = [row["url"].rsplit("/", 1)[-1] for row in published]
    assert verdicts(batch, kept, drops) == [*(expected.get(name) for name in names), None, *["no_image"] * 6]
    for row in kept.to_pylist():
        name = row["caption"].split()[-1]
        if name not in by_name:
            continue
        assert (row["width"], row["height"]) == Image.open(io.BytesIO(row["image"])).size == (64, 64)
        # The image has been resized, so only the table has its published size.
        assert (row["original_width"], row["original_height"]) == (100 + 20 * int(name), 90)
        assert row["original_bytes"] == len(row["image"])
        assert (row["original_format"], row["animated"]) == ("jpeg", False)
    assert len(set(kept["sha256"].to_pylist())) == 20


def test_bytes_are_those_of_the_tar(folders: Path, tmp_path: Path) -> None:
    with tarfile.open(folders / "laion" / "00001.tar") as tar:
        expected = {
            m.name.split(".")[0]: tar.extractfile(m).read()  # type: ignore[union-attr]
            for m in tar
            if m.name.endswith("jpg")
        }
    kept, _ = run_step(step(folders / "laion", tmp_path), make_batch([{"key": key} for key in expected]))
    assert len(expected) == 10
    assert dict(zip(kept["key"].to_pylist(), kept["image"].to_pylist())) == expected


def test_the_index_is_made_once(folders: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[int] = []
    make = Folder._make
    monkeypatch.setattr(Folder, "_make", lambda self, shard: made.append(shard) or make(self, shard))
    batch = make_batch([{"key": f"{n:09d}"} for n in range(20)])
    for _ in range(2):
        kept, _ = run_step(step(folders / "laion", tmp_path), batch)
        assert len(kept) == 20
    assert sorted(made) == [0, 1]


def test_a_remote_folder(folders: Path, tmp_path: Path) -> None:
    memory = fsspec.filesystem("memory")
    memory.put(str(folders / "laion"), "/pools/laion", recursive=True)
    remote = step("memory://pools/laion", tmp_path)
    kept, _ = run_step(remote, make_batch([{"key": f"{n:09d}"} for n in range(10)]))
    assert len(kept) == 10


def test_changed_tars_change_the_fingerprint(folders: Path, tmp_path: Path) -> None:
    folder = tmp_path / "copy"
    fsspec.filesystem("file").put(str(folders / "laion"), str(folder), recursive=True)
    before = step(folder, tmp_path)
    kept, _ = run_step(before, make_batch([{"key": "000000000"}]))
    add(folder / "00000.tar", {"000000000.jpg": jpeg(30, 30, seed=99)})
    after = step(folder, tmp_path)
    assert after.fingerprint() != before.fingerprint()
    again, _ = run_step(after, make_batch([{"key": "000000000"}]))
    assert again["sha256"] != kept["sha256"]


def add(path: Path, members: dict[str, bytes | str]) -> None:
    """Writes a tar. A string value is the target of a symbolic link."""
    with tarfile.open(path, "w") as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            if isinstance(data, str):
                info.type, info.linkname = tarfile.SYMTYPE, data
                tar.addfile(info)
            else:
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))


def test_hostile_and_damaged_tars(tmp_path: Path) -> None:
    (tmp_path / "f").mkdir()
    good, turned = jpeg(40, 30), io.BytesIO()
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.open(io.BytesIO(good)).save(turned, "JPEG", exif=exif)
    add(
        tmp_path / "f" / "00001.tar",
        {
            "../../000010000.jpg": good,
            "/etc/000010001.jpg": good,
            "000010002.jpg": "/etc/hostname",
            "000010003.jpg": b"<html>",
            "000010004.jpg": turned.getvalue(),
            "000010005.jpg": b"",
            "000010006.jpg": jpeg(2000, 2000),
            "000010007.jpg": good,
            "000010007.png": b"a second one of the name",
            "000010008.jpg": good,
        },
    )
    with (tmp_path / "f" / "00001.tar").open("r+b") as file:
        file.truncate(file.read().rindex(good) + 100)
    (tmp_path / "f" / "00002.tar").write_bytes(b"no tar at all" * 1000)
    (tmp_path / "f" / "00003.tar").write_bytes(b"")
    (tmp_path / "f" / "00004.tar").write_bytes(gzip.compress(b"a tar"))
    batch = make_batch([{"key": f"{10000 + n:09d}"} for n in range(10)] + [{"key": f"0000{n}0000"} for n in (2, 3, 4)])
    kept, drops = run_step(step(tmp_path / "f", tmp_path, max_image_area=1e6), batch)
    assert verdicts(batch, kept, drops) == [
        *["no_image"] * 3, "not_an_image", None, "not_an_image", "too_large", None, "shard_truncated",
        *["no_image"] * 4,
    ]  # fmt: skip
    # A picture that was never there differs from one that was lost.
    details = dict(zip(drops["row"].to_pylist(), drops["detail"].to_pylist()))
    assert re.fullmatch(r"not in 00001.tar, which is damaged: cut at byte .*", details[9])
    assert details[10].startswith("not in 00002.tar, which is damaged: no tar header at byte 0")
    assert details[11].startswith("not in 00003.tar, which is damaged: cut at byte 0")
    assert "a compressed tar has no random access; decompress it first" in details[12]
    # Rotated pictures are stored upright, without the tag.
    upright = Image.open(io.BytesIO(kept["image"][0].as_py()))
    assert (upright.size, dict(upright.getexif())) == ((30, 40), {})
    assert kept["image"][1].as_py() == good


def test_names_are_read_as_webdataset_reads_them(tmp_path: Path) -> None:
    (tmp_path / "f").mkdir()
    add(
        tmp_path / "f" / "00001.tar",
        {
            "000010000.JPG": jpeg(40, 30),
            "./000010001.jpeg": jpeg(40, 30),
            "000010002.seg.png": jpeg(40, 30),
            "000010002.jpg": jpeg(50, 30),
            "._000010003.jpg": b"what macOS puts beside a file",
            "000010003.jpg": jpeg(40, 30),
            "000010004.v2.jpg": jpeg(40, 30),
            "folder.d/000010005.jpg": jpeg(40, 30),
        },
    )
    batch = make_batch([{"key": f"{10000 + n:09d}"} for n in range(6)])
    kept, drops = run_step(step(tmp_path / "f", tmp_path), batch)
    assert verdicts(batch, kept, drops) == [None, None, None, None, "no_image", "no_image"]
    assert kept["width"].to_pylist() == [40, 40, 50, 40]


def test_a_forged_size_is_harmless(tmp_path: Path) -> None:
    (tmp_path / "f").mkdir()
    info = tarfile.TarInfo("000010000.jpg")
    header = bytearray(info.tobuf())
    header[124:136] = b"\xff" * 12  # base 256: minus one
    header[148:156] = b"%06o\0 " % tarfile.calc_chksums(bytes(header))[0]
    (tmp_path / "f" / "00001.tar").write_bytes(bytes(header) * 4)
    batch = make_batch([{"key": "000010000"}])
    kept, drops = run_step(step(tmp_path / "f", tmp_path), batch)
    assert verdicts(batch, kept, drops) == ["no_image"]


def test_our_own_shards(tmp_path: Path) -> None:
    """Their keys have as many row digits as `samples_per_shard` needs, independent of the width of names."""
    images = [jpeg(50 + n, 50, seed=n) for n in range(7)]
    batch = make_batch([{"image": image, "original_width": 50 + n} for n, image in enumerate(images)])
    types = {name: batch.schema.field(name).type for name in ("uid", "url", "caption", "image", "original_width")}
    store, writer = Store(str(tmp_path / "shards")), WriteShards(samples_per_shard=3)
    for shard in range(3):
        writer.write(store, shard, iter([batch.slice(3 * shard, 3)]), types)
    rows = tables(tmp_path / "shards").to_pylist()
    kept, _ = run_step(step(tmp_path / "shards", tmp_path), make_batch([{"key": row["key"]} for row in rows]))
    kept = kept.sort_by("key")
    assert kept["original_width"].to_pylist() == [50 + n for n in range(7)]
    assert kept["image"].to_pylist() == images


def test_an_invalid_folder_is_reported_before_the_start(tmp_path: Path) -> None:
    assert dict(step(tmp_path / "nowhere", tmp_path).check()) == {"path": f"{tmp_path}/nowhere does not exist"}
    (tmp_path / "f").mkdir()
    assert "contains no NNNNN.tar" in dict(step(tmp_path / "f", tmp_path).check())["path"]
    add(tmp_path / "f" / "00007.tar", {"000000001.jpg": jpeg()})
    with pytest.raises(ValueError, match="expected a folder written by img2dataset"):
        step(tmp_path / "f", tmp_path).setup()


RECIPE = """
name: again
pool: {{path: {folder}/*.parquet, columns: [key], uid: {uid}}}
run: {name}
steps:
  - read_shards: {{path: {folder}, index: index}}
  - image_size: {{min_side: 80}}
  - {dedup}
  - write_shards: {{samples_per_shard: 8}}
"""


@pytest.mark.parametrize(
    ("name", "uid", "dedup"), [("laion", "null", "near_dedup"), ("datacomp", "uid", "exact_dedup: {by: [sha256]}")]
)
def test_a_run_from_a_folder(folders: Path, run: Command, tmp_path: Path, name: str, uid: str, dedup: str) -> None:
    (tmp_path / "r.yaml").write_text(RECIPE.format(folder=folders / name, name=name, uid=uid, dedup=dedup))
    done = run("r.yaml")
    assert done.returncode == 0, done.stderr
    books = json.loads((tmp_path / name / "funnel.json").read_text())
    lines = {line["step"]: line for line in books["steps"]}
    assert lines["read_shards"]["dropped"] == {"decode_error": 1, "http_404": 1, "http_503": 1}
    assert lines["image_size"]["dropped"] == {}
    out = tables(tmp_path / name / "shards")
    assert books["rows_in"] == 23
    assert len(out) == books["kept"] == 20 - sum(lines[dedup.partition(":")[0]]["dropped"].values())
    assert out["key"].to_pylist() == [f"{n // 8 * 10 + n % 8:09d}" for n in range(len(out))]
    theirs = {row["url"]: row for row in tables(folders / name).to_pylist()}
    for row in out.to_pylist():
        published = theirs[row["url"]]
        assert row["uid"] == published.get("uid", row["uid"])
        assert (row["original_width"], row["width"], row["exif"]) == (
            published["original_width"],
            published["width"],
            published["exif"],
        )
