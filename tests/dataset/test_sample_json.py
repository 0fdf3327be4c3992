"""One JSON form per Arrow type, accepted by strict parsers."""

from __future__ import annotations

import datetime
import decimal
import json
import uuid
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from pipeline.dataset.sample_json import ORDER, json_type, json_values, sample_json, sample_types
from pipeline.schema import PICTURE

NAN, INF = float("nan"), float("inf")
MOMENT = datetime.datetime(2024, 2, 29, 12, 30)
U64 = pa.uint64()
STRANGE = pa.struct([("a", pa.float64()), ("b", pa.list_(U64))])


@pytest.mark.parametrize(
    ("dtype", "values", "expected"),
    [
        (pa.float64(), [NAN, INF, -INF, 0.1, None], [None, None, None, 0.1, None]),
        (pa.float32(), [NAN, 0.2813, 16777216.0], [None, 0.2813, 16777216.0]),
        (pa.float16(), [np.float16(0.1), np.float16(INF)], [0.1, None]),
        (pa.int64(), [2**63 - 1, -(2**63), None], [2**63 - 1, -(2**63), None]),
        (U64, [2**64 - 1, 7, None], ["18446744073709551615", "7", None]),
        (pa.bool_(), [True, None], [True, None]),
        (pa.null(), [None], [None]),
        (pa.string_view(), ["é\u2028", None], ["é\u2028", None]),
        (pa.dictionary(pa.int8(), pa.string()), ["a", None, "a"], ["a", None, "a"]),
        (pa.binary(), [b"\x00\xff", b"", None], ["AP8=", "", None]),
        (pa.binary(2), [b"ab"], ["YWI="]),
        (pa.decimal128(8, 2), [decimal.Decimal("1.50"), None], ["1.50", None]),
        (pa.date32(), [MOMENT.date(), None], ["2024-02-29", None]),
        (pa.timestamp("s"), [MOMENT], ["2024-02-29T12:30:00"]),
        (pa.timestamp("ns"), [1], ["1970-01-01T00:00:00.000000001"]),
        (pa.timestamp("ms", "Asia/Tokyo"), [0], ["1970-01-01T00:00:00.000Z"]),
        (pa.timestamp("s"), [10**11, 10**16], ["5138-11-16T09:46:40", None]),
        (pa.time32("s"), [datetime.time(1, 2, 3)], ["01:02:03"]),
        (pa.duration("ms"), [1500, None], [1.5, None]),
        (pa.list_(pa.float64()), [[NAN, 1.0], [], None], [[None, 1.0], [], None]),
        (pa.list_(pa.float32(), 2), [[NAN, 0.1], None], [[None, 0.1], None]),
        (pa.list_view(pa.int8()), [[1, 2]], [[1, 2]]),
        (pa.list_(pa.list_(pa.string())), [[["x"], None], None], [[["x"], None], None]),
        (STRANGE, [{"a": NAN, "b": [2**64 - 1]}, None], [{"a": None, "b": ["18446744073709551615"]}, None]),
        (pa.map_(pa.string(), pa.float64()), [[("k", NAN)], [], None], [[{"key": "k", "value": None}], [], None]),
    ],
    ids=str,
)
@pytest.mark.parametrize("start", [0, 1])
def test_each_type_has_one_json_form(dtype: pa.DataType, values: list[Any], expected: list[Any], start: int) -> None:
    array = pa.array([*values, *values], dtype).slice(start)
    found = json_values(array)
    assert found == [*expected, *expected][start:]
    json.dumps(found, allow_nan=False)
    json_form = pa.array(found, json_type(dtype))  # as a reader would store it
    assert json_form.null_count == pa.array([*expected, *expected][start:]).null_count


def test_uuids_have_their_usual_form() -> None:
    one = uuid.UUID("12345678-1234-5678-1234-567812345678")
    assert json_values(pa.array([one.bytes, None], pa.uuid())) == [str(one), None]


def test_invalid_utf8_of_a_table_stays_out_of_the_json() -> None:
    broken = pa.array([b"a\xff", b"\xed\xa0\x80", None], pa.binary()).view(pa.string())
    assert json_values(broken) == ["a\ufffd", "\ufffd\ufffd\ufffd", None]
    nested = pa.ListArray.from_arrays(pa.array([0, 1]), broken.slice(0, 1))
    assert json_values(nested) == [["a\ufffd"]]


def test_img2datasets_keys_come_last_in_its_order() -> None:
    types = {"unit": pa.int32(), "uid": pa.string(), "caption": pa.string(), "url": pa.string(), "score": pa.float32(),
             "vector": pa.list_(pa.float16(), 4), "key": pa.string(), **PICTURE}  # fmt: skip
    further = ["score", "original_bytes", "original_format", "animated", "phash"]
    assert list(sample_types(types)) == [*further, *ORDER]


def test_a_sample_is_one_line_of_strict_json() -> None:
    table = pa.table(
        {
            "uid": ["0" * 32],
            "caption": ['a "quote"\n\x1b[2J\u2028'],
            "score": pa.array([NAN], pa.float32()),
            "phash": pa.array([255], U64),
            "serial": pa.array([255], U64),
        }
    )
    (line,) = sample_json(table)
    assert b"\n" not in line
    assert json.loads(line, parse_constant=pytest.fail) == {
        "score": None,
        "phash": "00000000000000ff",
        "serial": "255",
        "caption": 'a "quote"\n\x1b[2J\u2028',
        "status": "success",
        "error_message": None,
        "uid": "0" * 32,
    }
