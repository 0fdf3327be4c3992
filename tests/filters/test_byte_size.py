from __future__ import annotations

from pipeline.filters.byte_size import ByteSize
from tests.tables import check_filter, make_batch, run_step


def test_small_files_are_dropped() -> None:
    sizes = {5000: None, 4999: "too_small", 0: "too_small", None: "too_small", 2**40: None}
    check_filter(ByteSize(), [{"original_bytes": n} for n in sizes], list(sizes.values()))


def test_the_detail_is_the_size() -> None:
    _, drops = run_step(ByteSize(), make_batch([{"original_bytes": 43}, {"original_bytes": None}]))
    assert drops["detail"].to_pylist() == ["43", "unknown"]
    assert drops["value"].to_pylist() == [43.0, None]


def test_a_limit_that_keeps_everything_is_refused() -> None:
    assert [key for key, _ in ByteSize(min=0).check()] == ["min"]
