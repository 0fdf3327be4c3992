"""Metadata of a finished dataset: `README.md`, a Hugging Face dataset card, and `croissant.json`.

Both depend only on the dataset's content and its run, so equal runs have equal cards. Facts known only to the publisher
(licence, creator, address, date) are stated as unknown. Neither contains the pool's location or options, since an
address may contain a password.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import quote

import pyarrow as pa
import yaml

from pipeline.dataset.sample_json import sample_types
from pipeline.ledger import Funnel
from pipeline.storage import Entry

_SIZES = (("n<1K", 10**3), ("1K<n<10K", 10**4), ("10K<n<100K", 10**5), ("100K<n<1M", 10**6), ("1M<n<10M", 10**7),
          ("10M<n<100M", 10**8), ("100M<n<1B", 10**9), ("1B<n<10B", 10**10), ("10B<n<100B", 10**11))  # fmt: skip
_RIGHTS = (
    "Unknown. Each image and caption belongs to its owner, under terms that were not recorded. The column url has the "
    "source of each image."
)


@dataclass(frozen=True)
class About:
    """A description of a dataset beyond its files."""

    name: str
    types: dict[str, pa.DataType]
    """The columns of its rows, from the pool and every step."""
    funnel: Funnel = field(default_factory=Funnel)
    """Rows dropped by each step of the run, by reason."""
    honours: Sequence[str] = ()
    """The publisher opt-outs that the run honoured, such as `robots.txt (RFC 9309)`."""


# --- README.md --------------------------------------------------------------------------------------------------------


def readme(about: About, tars: Sequence[Entry], samples: int, extensions: Sequence[str]) -> str:
    """The card of a dataset: YAML front matter for `datasets.load_dataset`, then Markdown for people.

    Each Python block in it runs unchanged in the folder of the shards.
    """
    front: dict[str, Any] = {
        "pretty_name": about.name,
        "license": "unknown",
        "task_categories": ["zero-shot-image-classification", "image-to-text", "text-to-image"],
        "tags": ["webdataset", "image-text"],
        "size_categories": [next((name for name, end in _SIZES if samples < end), "100B<n<1T")],
    }
    if tars:
        # State the types: readers that infer them fail if a column is null in the first samples.
        images = [{"name": e, "dtype": "binary" if e == "bin" else "image"} for e in extensions]
        measured = {
            "name": "json",
            **_feature(pa.struct(list(sample_types({**about.types, "key": pa.string()}).items()))),
        }
        texts = [{"name": name, "dtype": "string"} for name in ("txt", "__key__", "__url__")]
        front["configs"] = [{"config_name": "default", "data_files": [{"split": "train", "path": "*.tar"}]}]
        front["dataset_info"] = {"features": [*images, measured, *texts]}
    parts = [
        f"---\n{yaml.safe_dump(front, sort_keys=False, allow_unicode=True, width=120)}---\n",
        f"# {_inline(about.name)}\n",
        _summary(about, tars, samples),
        _FILES.format(pictures=", ".join(f"`KEY.{e}`" for e in extensions) or "`KEY.jpg`"),
        *([_use(extensions)] if tars else []),
        *([_origin(about)] if about.funnel.lines else []),
        f"## Rights\n\n- Licence: {_RIGHTS}\n- {_wishes(about)}\n",
        "## Columns\n\n" + "".join(f"- {_code(n)}: {t}\n" for n, t in {"key": pa.string(), **about.types}.items()),
    ]
    return "\n".join(parts)


_FILES = """\
## Files

- `NNNNN.tar`: WebDataset; per sample {pictures}, `KEY.json`, `KEY.txt`
- `NNNNN.parquet`: the same samples with all columns; `key` identifies the sample in the tar
- `NNNNN.index.npy`: int64, one row per sample: offset and size of the picture, the JSON and the text in the tar
- `manifest.json`: samples, bytes and sha256; `sizes.json`, `wids.json` and `subset.npy` (DataComp): for their tools;
  `croissant.json`: Croissant 1.1 metadata of the tables
"""


def _summary(about: About, tars: Sequence[Entry], samples: int) -> str:
    size = sum(tar["bytes"] for tar in tars)
    of = f", selected from {about.funnel.rows_in:,} candidates" if about.funnel.lines else ""
    return f"{samples:,} image–text pairs in {len(tars):,} WebDataset shards ({size / 1e9:.3f} GB){of}.\n"


def _use(extensions: Sequence[str]) -> str:
    picture = ";".join(extensions)
    return f"""\
## Use

Run each example in this folder. With Hugging Face `datasets`:

```python
import os

from datasets import load_dataset

rows = load_dataset(os.getcwd(), split="train", streaming=True)
row = next(iter(rows))
print(row["{extensions[0]}"], row["txt"], row["json"]["uid"])
```

With `webdataset` and PyTorch:

```python
from glob import glob

import webdataset as wds
from torch.utils.data import DataLoader

samples = wds.WebDataset(sorted(glob("*.tar")), shardshuffle=100).shuffle(1000).decode("torchrgb8")
for image, caption in DataLoader(samples.to_tuple("{picture}", "txt"), batch_size=None):
    print(image.shape, caption)
    break
```

Random access with `wids` (in webdataset before 1.0). `localname=str` reads the tars in place, because its cache
identifies copies by name only:

```python
import wids

samples = wids.ShardListDataset("wids.json", localname=str, transformations=[])
print(len(samples), samples[0][".txt"].read().decode())
```

The tables alone, with DuckDB, Polars or Croissant:

```python
import duckdb

print(duckdb.sql("select uid, caption from '*.parquet' limit 5"))
```

```python
import polars

print(polars.scan_parquet("*.parquet").select("uid", "caption").head(5).collect())
```

```python
import mlcroissant

for record in mlcroissant.Dataset("croissant.json").records("samples"):
    print(record["samples/uid"], record["samples/caption"])
    break
```
"""


def _origin(about: About) -> str:
    lines = ["| step | rows in | kept | dropped |", "|---|--:|--:|---|"]
    for label, line in about.funnel.lines.items():
        most_first = sorted(line.dropped.items(), key=lambda item: (-item[1], item[0]))
        dropped = ", ".join(f"{_inline(reason)} {n:,}" for reason, n in most_first)
        lines.append(f"| {_inline(label)} | {line.rows_in:,} | {line.kept:,} | {dropped} |")
    note = "The run's `drops/*.parquet` contains every dropped row with step and reason."
    return "## Provenance\n\n" + "\n".join(lines) + f"\n\n{note}\n"


def _wishes(about: About) -> str:
    if not about.honours:
        return "Publisher opt-outs: the run that made this dataset fetched nothing itself, or honoured none."
    return f"Publisher opt-outs honoured: {'; '.join(about.honours)}."


def _feature(dtype: pa.DataType) -> dict[str, Any]:
    """A type of `sample_types` in the YAML of a dataset card."""
    if pa.types.is_struct(dtype):
        return {"struct": [{"name": child.name, **_feature(child.type)} for child in dtype]}
    if pa.types.is_list(dtype):
        inner = _feature(dtype.value_type)
        return {"list": inner.get("dtype") or inner.get("struct") or inner}
    names = {pa.float32(): "float32", pa.float64(): "float64"}
    return {"dtype": names.get(dtype, str(dtype))}


def _inline(text: str) -> str:
    """Escapes untrusted text for a line of Markdown."""
    printable = "".join(c if c.isprintable() else " " for c in text)
    return re.sub(r"([\\`*_\[\]<>|#])", r"\\\1", printable)


def _code(text: str) -> str:
    return "`" + "".join(c if c.isprintable() and c != "`" else " " for c in text) + "`"


# --- croissant.json ---------------------------------------------------------------------------------------------------

# Appendix 1 of the specification (docs.mlcommons.org/croissant/docs/croissant-spec-1.1.html).
_CONTEXT: dict[str, Any] = {
    "@language": "en",
    "@vocab": "https://schema.org/",
    "sc": "https://schema.org/",
    "cr": "http://mlcommons.org/croissant/",
    "rai": "http://mlcommons.org/croissant/RAI/",
    "dct": "http://purl.org/dc/terms/",
    **{
        term: f"cr:{term}"
        for term in (
            "annotation", "arrayShape", "citeAs", "column", "containedIn", "equivalentProperty", "excludes", "extract",
            "field", "fileObject", "fileProperty", "fileSet", "format", "includes", "isArray", "isLiveDataset",
            "jsonPath", "key", "md5", "parentField", "path", "readLines", "recordSet", "references", "regex",
            "repeated", "replace", "samplingRate", "sdVersion", "separator", "source", "subField", "transform",
            "unArchive", "value",
        )
    },
    "conformsTo": "dct:conformsTo",
    "data": {"@id": "cr:data", "@type": "@json"},
    "dataType": {"@id": "cr:dataType", "@type": "@vocab"},
    "examples": {"@id": "cr:examples", "@type": "@json"},
    "description": {"@container": "@language"},
    "name": {"@container": "@language"},
}  # fmt: skip


def croissant(about: About, tars: Sequence[Entry], tables: Sequence[Entry], samples: int) -> dict[str, Any]:
    """Metadata in MLCommons' Croissant 1.1: every tar and table with its digest, and the tables as one record set.

    The record set has the columns of text, numbers, booleans, dates, and flat lists of these; Croissant has no type for
    others. It leaves out the pictures, because mlcroissant 1.1 caches unpacked tars by name only and could show
    pictures of another dataset's `00000.tar`.
    """
    fields = {
        name: found for name, dtype in {"key": pa.string(), **about.types}.items() if (found := _data_type(dtype))
    }
    return {
        "@context": _CONTEXT,
        "@type": "sc:Dataset",
        "conformsTo": "http://mlcommons.org/croissant/1.1",
        "name": about.name,
        "description": _summary(about, tars, samples).strip(),
        "url": "./",
        "license": {"@type": "sc:CreativeWork", "name": "unknown", "description": _RIGHTS},
        "creator": {"@type": "sc:Organization", "name": "unknown"},
        "citeAs": _citation(about, samples),
        "version": "1.0.0",
        "keywords": ["image-text pairs", "WebDataset"],
        "distribution": [
            *(_file_object(file, "application/x-tar") for file in tars),
            *(_file_object(file, "application/x-parquet") for file in tables),
            {
                "@type": "cr:FileSet",
                "@id": "tables",
                "name": "tables",
                "description": "The measurements of all samples.",
                "encodingFormat": "application/x-parquet",
                "includes": "*.parquet",
            },
        ],
        "recordSet": [
            {
                "@type": "cr:RecordSet",
                "@id": "samples",
                "name": "samples",
                "description": "One record per sample; `key` identifies it in its tar.",
                "key": {"@id": "samples/key"},
                "field": [
                    {
                        "@type": "cr:Field",
                        "@id": f"samples/{quote(name)}",
                        "name": name,
                        **found,
                        "source": {"fileSet": {"@id": "tables"}, "extract": {"column": name}},
                    }
                    for name, found in fields.items()
                ],
            }
        ],
    }


def _file_object(file: Entry, encoding: str) -> dict[str, Any]:
    return {
        "@type": "cr:FileObject",
        "@id": file["name"],
        "name": file["name"],
        "contentUrl": file["name"],
        "contentSize": f"{file['bytes']} B",
        "encodingFormat": encoding,
        "sha256": file["sha256"],
    }


def _data_type(dtype: pa.DataType) -> dict[str, Any]:
    """Croissant's type of a column; empty if there is none."""
    if pa.types.is_fixed_size_list(dtype) or pa.types.is_list(dtype) or pa.types.is_large_list(dtype):
        length = dtype.list_size if pa.types.is_fixed_size_list(dtype) else -1
        inner = {} if pa.types.is_nested(dtype.value_type) else _data_type(dtype.value_type)
        return inner and {**inner, "isArray": True, "arrayShape": str(length)}
    kinds: Iterable[tuple[str, Any]] = (
        ("sc:Text", pa.types.is_string),
        ("sc:Text", pa.types.is_large_string),
        ("sc:Boolean", pa.types.is_boolean),
        ("sc:Integer", pa.types.is_integer),
        ("sc:Float", pa.types.is_floating),
        ("sc:Float", pa.types.is_decimal),
        ("sc:Date", pa.types.is_date),
        ("sc:DateTime", pa.types.is_timestamp),
        ("sc:Time", pa.types.is_time),
    )
    return next(({"dataType": name} for name, test in kinds if test(dtype)), {})


def _citation(about: About, samples: int) -> str:
    name = re.sub(r"[^0-9A-Za-z]+", "-", about.name).strip("-") or "dataset"
    title = re.sub(r"[{}\\]", "", about.name)
    return f"@misc{{{name}, title = {{{title}}}, note = {{{samples:,} image–text pairs, curated with Winnow}}}}"
