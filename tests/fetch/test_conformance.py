"""Compares `download` with img2dataset on the same rows: sizes, keys, statuses, metadata, pixels, and the intended
differences.

One img2dataset process, with its own Downloader and writer, serves all tests of the module.
"""

from __future__ import annotations

import ast
import dataclasses
import importlib.util
import io
import itertools
import json
import re
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from pipeline.fetch.decoder import EncodeFormat, ResizeMode, Rules, decode
from pipeline.fetch.img2dataset_engine import failure
from pipeline.reference import reasons_section
from pipeline.stages.download import Download
from pipeline.stages.read_shards import REASONS as READ_REASONS
from pipeline.stages.write_shards import WriteShards
from pipeline.step import apply
from pipeline.storage import Store
from tests.conftest import ROOT
from tests.fetch.img2dataset_jobs import write_folders
from tests.fetch.server import Server, answer, redirect, serving
from tests.images import encoded

SIZES = [(1, 1), (2, 3), (17, 31), (48, 48), (49, 48), (47, 48), (48, 49), (95, 47), (96, 96), (97, 193), (300, 200),
         (333, 111), (111, 333), (211, 210), (7, 200), (200, 7), (1, 90), (321, 213)]  # fmt: skip
QUALITY = {"jpg": 95, "png": 4, "webp": 95}
COMBINATIONS = list(itertools.product(get_args(ResizeMode), get_args(EncodeFormat), (False, True)))
LIMITS = {"min_image_size": 5, "max_image_area": 60_000.0, "max_aspect_ratio": 20.0}


def photo(width: int, height: int, seed: int, mode: str = "RGB") -> Image.Image:
    """Shapes with a little noise, like photographs."""
    rng = np.random.default_rng(seed)
    channels = len(Image.new(mode, (1, 1)).getbands())
    coarse = rng.integers(0, 255, (5, 5, channels), np.uint8).squeeze()
    smooth = np.asarray(Image.fromarray(coarse, mode).resize((width, height), Image.Resampling.BICUBIC)).astype(int)
    return Image.fromarray((smooth + rng.integers(-6, 7, smooth.shape)).clip(0, 255).astype(np.uint8), mode)


def corpus() -> dict[str, bytes]:
    bodies = {f"jpeg-{w}x{h}": encoded(photo(w, h, i), "JPEG", quality=90) for i, (w, h) in enumerate(SIZES)}
    exif = Image.Exif()
    exif[0x010E], exif[0x0110] = "a caption of the camera's", "Model 7"
    return bodies | {
        "jpeg-exif": encoded(photo(90, 60, 20), "JPEG", exif=exif),
        "jpeg-grey": encoded(photo(91, 61, 21, "L"), "JPEG"),
        "jpeg-progressive": encoded(photo(92, 62, 22), "JPEG", progressive=True),
        "jpeg-444": encoded(photo(93, 63, 23), "JPEG", subsampling=0),
        "png": encoded(photo(94, 64, 24), "PNG"),
        "png-small": encoded(photo(30, 20, 24), "PNG"),
        "png-grey": encoded(photo(95, 65, 25, "L"), "PNG"),
        "png-alpha": encoded(photo(96, 66, 26, "RGBA"), "PNG"),
        "png-palette": encoded(photo(97, 67, 27).quantize(64), "PNG"),
        "webp": encoded(photo(98, 68, 28), "WEBP", quality=90),
        "webp-small": encoded(photo(31, 21, 28), "WEBP", quality=90),
        "gif": encoded(photo(99, 69, 29).quantize(64), "GIF"),
    }


BODIES = corpus()
BROKEN = {"html": b"<!doctype html>", "empty": b"", "cut": BODIES["jpeg-300x200"][:30]}


@dataclass
class Peer:
    root: Path
    server: Server
    urls: dict[str, str]
    """The url of each body of BODIES."""

    def table(self, folder: str) -> list[dict[str, Any]]:
        """The rows of the folder's parquet, sorted by key."""
        return sorted(pq.read_table(self.root / folder / "00000.parquet").to_pylist(), key=lambda row: row["key"])

    def members(self, folder: str) -> dict[str, bytes]:
        return read_tar(self.root / folder / "00000.tar")


def read_tar(path: Path) -> dict[str, bytes]:
    with tarfile.open(path) as tar:
        return {member.name: tar.extractfile(member).read() for member in tar}  # type: ignore[union-attr]


def name_of(mode: str, encode_format: str, only_if_bigger: bool) -> str:
    return f"{mode}-{encode_format}-{only_if_bigger}"


def deep_png() -> bytes:
    ramp = np.linspace(0, 65535, 64 * 48).astype(np.uint16).reshape(48, 64)
    return encoded(Image.fromarray(ramp), "PNG")


def turned_jpeg() -> bytes:
    exif = Image.Exif()
    exif[0x0112] = 6
    return encoded(photo(90, 60, 30), "JPEG", exif=exif)


@pytest.fixture(scope="module")
def peer(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Peer]:
    root = tmp_path_factory.mktemp("img2dataset")
    (root / "local.jpg").write_bytes(BODIES["jpeg-48x48"])
    special = {"deep": deep_png(), "turned": turned_jpeg()}
    answers = {name: answer(body=body) for name, body in {**BODIES, **BROKEN, **special}.items()}
    with serving({"inside": answer(body=BODIES["jpeg-48x48"])}) as private:
        answers["private"] = redirect(f"{private.url}/inside")
        with serving(answers) as server:

            def columns(names: list[str]) -> dict[str, list[Any]]:
                """Columns in the order of img2dataset's own reader."""
                captions = [f"caption of {name} “ü”" for name in names]
                return {"source": names, "caption": captions, "url": [f"{server.url}/{name}" for name in names]}

            def job(folder: str, names: list[str], **options: Any) -> dict[str, Any]:
                encode_format = options.get("encode_format", "jpg")
                defaults = {"image_size": 48, "encode_quality": QUALITY[encode_format]}
                return {"folder": str(root / folder), "columns": columns(names), **defaults, **options}

            jobs = [
                job(name_of(mode, kind, bigger), list(BODIES), resize_mode=mode, encode_format=kind,
                    resize_only_if_bigger=bigger)
                for mode, kind, bigger in COMBINATIONS
            ]  # fmt: skip
            keep = {"resize_mode": "keep_ratio_largest", "resize_only_if_bigger": True}
            jobs += [
                job(f"kept-{kind}", list(BODIES), encode_format=kind, skip_reencode=True, **keep) for kind in QUALITY
            ]
            jobs.append(job("statuses", [*BODIES, *BROKEN, "missing"], **keep, **LIMITS))
            jobs.append(job("special", [*special, "private"], resize_mode="no"))
            jobs[-1]["columns"]["url"].append(f"file://{root}/local.jpg")
            jobs[-1]["columns"]["caption"].append("a file")
            jobs[-1]["columns"]["source"] = [*special, "private", "file"]
            write_folders(jobs)
            yield Peer(root, server, dict(zip(BODIES, columns(list(BODIES))["url"])))


def pixels(image: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(image)).convert("RGB")).astype(int)


@pytest.mark.parametrize(("mode", "encode_format", "only_if_bigger"), COMBINATIONS)
def test_the_same_sizes_metadata_and_pixels(
    peer: Peer, mode: ResizeMode, encode_format: EncodeFormat, only_if_bigger: bool
) -> None:
    folder = name_of(mode, encode_format, only_if_bigger)
    rules = Rules(
        image_size=48, resize_mode=mode, resize_only_if_bigger=only_if_bigger, encode_format=encode_format,
        encode_quality=QUALITY[encode_format], decode="exact",
    )  # fmt: skip
    members = peer.members(folder)
    wrong = []
    for row, (name, body) in zip(peer.table(folder), BODIES.items(), strict=True):
        assert row["status"] == "success", row
        ours, image = decode(body, rules), members[f"{row['key']}.{encode_format}"]
        facts = ("width", "height", "original_width", "original_height", "sha256", "exif")
        if [getattr(ours, fact) for fact in facts] != [row[fact] for fact in facts]:
            wrong.append((name, ours, row))
            continue
        assert image[:2] == ours.image[:2]
        difference = np.abs(pixels(ours.image) - pixels(image)).mean()
        if difference > 2:
            wrong.append((name, difference))
    assert not wrong, wrong


@pytest.mark.parametrize("encode_format", list(QUALITY))
def test_equal_bytes_if_nothing_changes(peer: Peer, encode_format: EncodeFormat) -> None:
    """With `skip_reencode`, a small image in the target format is unchanged."""
    rules = Rules(
        image_size=48, encode_format=encode_format, encode_quality=QUALITY[encode_format], decode="exact",
        skip_reencode=True,
    )  # fmt: skip
    members = peer.members(f"kept-{encode_format}")
    untouched = {}
    for row, (name, body) in zip(peer.table(f"kept-{encode_format}"), BODIES.items(), strict=True):
        image = members[f"{row['key']}.{encode_format}"]
        untouched[name] = (image == body, decode(body, rules).image == body)
    assert {name: theirs for name, (theirs, _) in untouched.items()} == {
        name: ours for name, (_, ours) in untouched.items()
    }
    assert any(ours for _, ours in untouched.values())


def download(peer: Peer, names: list[str], **options: Any) -> tuple[pa.Table, pa.Table]:
    """Our results for the same rows: kept rows and drops."""
    urls = [f"{peer.server.url}/{name}" if name != "file" else f"file://{peer.root}/local.jpg" for name in names]
    table = pa.table(
        {
            "unit": pa.array([0] * len(names), pa.int32()),
            "row": pa.array(range(len(names)), pa.int32()),
            "uid": [f"{n:032x}" for n in range(len(names))],
            "url": urls,
            "caption": [f"caption of {name} “ü”" for name in names],
            "source": names,
        }
    )
    step = Download(image_size=48, allow_addrs=[peer.server.addr], decode="exact", per_host=4, **options)
    assert list(step.check()) == []
    step.setup()
    return apply(step, table)


def test_the_same_statuses(peer: Peer) -> None:
    names = [*BODIES, *BROKEN, "missing"]
    kept, drops = download(peer, names, **LIMITS)
    reasons = dict(zip(drops["row"].to_pylist(), drops["reason"].to_pylist()))
    assert len(kept) + len(reasons) == len(names)
    theirs = {}
    for n, row in enumerate(peer.table("statuses")):
        theirs[n] = None if row["status"] == "success" else failure(row["status"], row["error_message"]).reason
    # img2dataset reports that non-images cannot be decoded; we report what they are.
    finer = {"html": "not_an_image", "empty": "empty_body"}
    expected = {n: finer.get(names[n], reason) for n, reason in theirs.items() if reason}
    assert reasons == expected
    assert set(reasons.values()) == {
        "http_404", "not_an_image", "empty_body", "decode_error", "too_small", "too_large", "aspect_ratio"
    }  # fmt: skip


def test_the_same_shard(peer: Peer, tmp_path: Path) -> None:
    """Our shard of the same rows has the same members, keys and texts. Its JSON contains img2dataset's."""
    folder = name_of("keep_ratio_largest", "jpg", True)
    kept, drops = download(peer, list(BODIES))
    assert len(drops) == 0
    types = {name: kept.schema.field(name).type for name in kept.column_names if name not in ("unit", "row")}
    WriteShards().write(Store(str(tmp_path)), 0, iter([kept]), types)
    ours, theirs = read_tar(tmp_path / "00000.tar"), peer.members(folder)
    assert sorted(ours) == sorted(theirs)
    further = {*Download.adds, "uid"} - {
        "width", "height", "original_width", "original_height", "sha256", "exif"
    }  # fmt: skip
    for name in theirs:
        if name.endswith(".txt"):
            assert ours[name] == theirs[name]
        if name.endswith(".json"):
            mine = [(key, value) for key, value in json.loads(ours[name]).items() if key not in further]
            assert mine == list(json.loads(theirs[name]).items())
    tables = pq.read_table(tmp_path / "00000.parquet"), pq.read_table(peer.root / folder / "00000.parquet")
    assert {*tables[1].column_names} - {*tables[0].column_names} == {"status", "error_message"}
    shared = [name for name in tables[1].column_names if name in tables[0].column_names]
    assert tables[0].select(shared).sort_by("key").to_pylist() == tables[1].select(shared).sort_by("key").to_pylist()


def test_intended_differences(peer: Peer) -> None:
    names = ["deep", "turned", "private", "file"]
    theirs = {row["source"]: row for row in peer.table("special")}
    kept, drops = download(peer, names, resize_mode="no", encode_format="jpg")
    ours = {row["source"]: row for row in kept.to_pylist()}
    # img2dataset follows redirects into the private network and reads local files.
    assert [theirs[name]["status"] for name in names] == ["success"] * 4
    assert dict(zip(drops["row"].to_pylist(), drops["reason"].to_pylist())) == {2: "addr_denied", 3: "bad_scheme"}
    # It ignores orientation.
    assert (theirs["turned"]["width"], theirs["turned"]["height"]) == (90, 60)
    assert (ours["turned"]["width"], ours["turned"]["height"]) == (60, 90)
    # It clips 16-bit values at 255, so most of the picture is white.
    members = peer.members("special")
    assert (pixels(members[f"{theirs['deep']['key']}.jpg"]) > 250).mean() > 0.9
    ramp = np.linspace(0, 255, 64 * 48).reshape(48, 64)
    assert np.abs(pixels(ours["deep"]["image"])[..., 0] - ramp).mean() < 2


def test_the_docs_list_every_img2dataset_option_and_every_reason() -> None:
    """docs/fetching.md must cover new options of img2dataset and new reasons."""
    page = (ROOT / "docs" / "fetching.md").read_text()
    spec = importlib.util.find_spec("img2dataset")
    assert spec is not None
    assert spec.origin is not None
    tree = ast.parse(Path(spec.origin).with_name("main.py").read_text())
    (function,) = (node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == "download")
    first, second = zip(*(line.split("|")[1:3] for line in page.splitlines() if line.count("|") == 4))
    theirs = set(re.findall(r"`(\w+)`", " ".join(first)))
    missing = {argument.arg for argument in function.args.args} - theirs
    assert not missing, missing
    same = {n for names, here in zip(first, second) if here.strip() == "same" for n in re.findall(r"`(\w+)`", names)}
    assert same
    assert same <= {f.name for f in dataclasses.fields(Download)}
    table = [line for line in reasons_section().splitlines() if line.startswith("|")]
    assert "\n".join(table) in page, "the table of reasons differs from `winnow steps`; copy it"
    for reason, meaning in READ_REASONS.items():
        assert f"| `{reason}` | {meaning} |" in page
