"""negCLIPLoss: what it refuses before a run. tests/scheduler/test_vectors.py compares its values with the formula."""

from __future__ import annotations

from typing import Any

import pyarrow as pa
import pytest

from pipeline.stages.neg_clip_loss import NegClipLoss


@pytest.mark.parametrize(
    ("options", "key", "message"),
    [
        ({"temperature": 0.0}, "temperature", "must be above 0, found 0.0"),
        ({"temperature": float("nan")}, "temperature", "must be above 0, found nan"),
        ({"batch_size": 1}, "batch_size", "must be 2 to 1,000,000, found 1"),
        ({"draws": 0}, "draws", "must be 1 to 10,000, found 0"),
        ({"column": "my score"}, "column", "'my score' is not a valid column name"),
    ],
)
def test_unusable_options(options: dict[str, Any], key: str, message: str) -> None:
    ((found, problem),) = NegClipLoss(**options).check()
    assert found == key
    assert message in problem


VECTORS = {"image_embedding": pa.list_(pa.float16(), 8), "text_embedding": pa.list_(pa.float16(), 8)}


@pytest.mark.parametrize(
    ("columns", "expected"),
    [
        ({}, []),
        (
            {"text_embedding": pa.list_(pa.float16(), 4)},
            [("text_vector", "image_embedding has 8 dimensions, and text_embedding has 4: they are from different "
              "models")],
        ),
        (
            {"image_embedding": pa.list_(pa.float16())},
            [("image_vector", "the column 'image_embedding' holds list<item: halffloat>, expected vectors: "
              "a fixed-size list of floats")],
        ),
        (
            {"image_embedding": pa.string(), "text_embedding": pa.list_(pa.int8(), 8)},
            [("image_vector", "the column 'image_embedding' holds string, expected vectors: a fixed-size list of "
              "floats"),
             ("text_vector", "the column 'text_embedding' holds fixed_size_list<item: int8>[8], expected vectors: "
              "a fixed-size list of floats")],
        ),
    ],
)  # fmt: skip
def test_columns_that_do_not_hold_vectors_are_refused(
    columns: dict[str, pa.DataType], expected: list[tuple[str, str]]
) -> None:
    assert list(NegClipLoss().check_columns({**VECTORS, **columns})) == expected
