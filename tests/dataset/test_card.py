"""The card and the Croissant file of a dataset."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pyarrow as pa
import pytest
import yaml

from pipeline.dataset.card import About, croissant, readme
from pipeline.stages.download import Download
from tests.stages import finished


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return finished.write(tmp_path_factory.mktemp("run") / "shards", ("JPEG", "PNG"))


def test_the_front_matter_states_every_type(folder: Path) -> None:
    _, front, text = (folder / "README.md").read_text().split("---\n", 2)
    card = yaml.safe_load(front)
    assert (card["license"], card["size_categories"]) == ("unknown", ["n<1K"])
    assert card["configs"] == [{"config_name": "default", "data_files": [{"split": "train", "path": "*.tar"}]}]
    features = {feature.pop("name"): feature for feature in card["dataset_info"]["features"]}
    assert list(features) == ["jpg", "png", "json", "txt", "__key__", "__url__"]
    keys = {child.pop("name"): child for child in features["json"]["struct"]}
    assert keys["late"] == keys["phash"] == keys["serial"] == keys["price"] == {"dtype": "string"}
    assert keys["boxes"] == {"list": {"list": "float64"}}
    assert keys["tags"] == {"list": [{"name": "key", "dtype": "string"}, {"name": "value", "dtype": "float32"}]}
    assert not {"image", "raw", "vector"} & set(keys)
    assert "# a set: \\*of\\* pictures\n" in text


def test_the_card_has_the_provenance(folder: Path) -> None:
    text = (folder / "README.md").read_text()
    assert "25 image–text pairs in 3 WebDataset shards (0.000 GB), selected from 100 candidates." in text
    assert "| download | 97 | 25 | http\\_404 60, opted\\_out 12 |" in text
    assert "Publisher opt-outs honoured: robots.txt (RFC 9309)." in text
    assert "- Licence: Unknown." in text


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, ["X-Robots-Tag (noai, noimageai, noml, noindex, noimageindex)", "robots.txt (RFC 9309)",
              "Content-Usage (train-ai, all; IETF aipref)", "the header tdm-reservation (TDMRep)",
              "/.well-known/tdmrep.json (TDMRep)"]),
        ({"robots_txt": False, "disallowed_header_directives": [], "content_usage": [], "tdmrep_json": False},
         ["the header tdm-reservation (TDMRep)"]),
        ({"engine": "img2dataset", "disallowed_header_directives": ["noai"]}, ["X-Robots-Tag (noai)"]),
    ],
)  # fmt: skip
def test_only_honoured_opt_outs_are_listed(options: dict[str, object], expected: list[str]) -> None:
    assert list(Download(**options).honours()) == expected  # type: ignore[arg-type]


def test_untrusted_text_is_escaped() -> None:
    about = About("x\n# y <b>", {"uid": pa.string(), "a`b\n## c": pa.string()})
    text = readme(about, [], 0, [])
    assert "# x \\# y \\<b\\>\n" in text
    assert "- `a b ## c`: string\n" in text


def test_an_empty_dataset_has_a_card_too() -> None:
    about = About("none", {"uid": pa.string()})
    text = readme(about, [], 0, [])
    assert "configs" not in yaml.safe_load(text.split("---\n")[1])
    assert croissant(about, [], [], 0)["description"] == "0 image–text pairs in 0 WebDataset shards (0.000 GB)."


def test_croissant_lists_every_tar_and_table_with_its_digest(folder: Path) -> None:
    found = json.loads((folder / "croissant.json").read_text(), parse_constant=pytest.fail)
    assert found["conformsTo"] == "http://mlcommons.org/croissant/1.1"
    assert {"name", "description", "url", "license", "creator", "citeAs", "version"} <= set(found)
    files = {entry["contentUrl"]: entry for entry in found["distribution"] if entry["@type"] == "cr:FileObject"}
    assert sorted(files) == sorted(p.name for p in folder.iterdir() if p.suffix in (".tar", ".parquet"))
    for name, entry in files.items():
        data = (folder / name).read_bytes()
        assert (entry["sha256"], entry["contentSize"]) == (hashlib.sha256(data).hexdigest(), f"{len(data)} B")


def test_croissant_types_the_columns_that_it_can(folder: Path) -> None:
    found = json.loads((folder / "croissant.json").read_text())
    fields = {field["name"]: field for field in found["recordSet"][0]["field"]}
    assert {name: fields[name]["dataType"] for name in ("key", "phash", "unsafe", "flag", "day", "taken")} == {
        "key": "sc:Text", "phash": "sc:Integer", "unsafe": "sc:Float", "flag": "sc:Boolean", "day": "sc:Date",
        "taken": "sc:DateTime",
    }  # fmt: skip
    assert (fields["vector"]["isArray"], fields["vector"]["arrayShape"]) == (True, "4")
    assert fields["face bboxes"]["@id"] == "samples/face%20bboxes"
    assert not {"image", "raw", "tags", "info", "boxes"} & set(fields)
