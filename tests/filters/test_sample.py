from __future__ import annotations

import pyarrow as pa
import pytest

from pipeline.filters.sample import Sample
from tests.tables import make_batch, run_step


def kept(batch: pa.Table, **options: float) -> set[str]:
    return set(run_step(Sample(**options), batch)[0]["uid"].to_pylist())  # type: ignore[arg-type]


BATCH = make_batch([{}] * 5000)


@pytest.mark.parametrize("fraction", [0.01, 0.1, 0.5, 1.0])
def test_about_the_fraction_is_kept(fraction: float) -> None:
    deviation = (5000 * fraction * (1 - fraction)) ** 0.5
    assert abs(len(kept(BATCH, fraction=fraction)) - 5000 * fraction) <= 4 * deviation


def test_the_sample_depends_only_on_the_uid() -> None:
    assert kept(BATCH.slice(1000, 500), fraction=0.5) == kept(BATCH, fraction=0.5) & set(
        BATCH.slice(1000, 500)["uid"].to_pylist()
    )


def test_smaller_samples_are_nested_and_seeds_are_independent() -> None:
    assert kept(BATCH, fraction=0.1) < kept(BATCH, fraction=0.5)
    both = kept(BATCH, fraction=0.5) & kept(BATCH, fraction=0.5, seed=1)
    assert abs(len(both) - 1250) < 130


@pytest.mark.parametrize("fraction", [0.0, -0.5, 1.5, float("nan")])
def test_invalid_options_are_reported(fraction: float) -> None:
    assert [key for key, _ in Sample(fraction=fraction).check()] == ["fraction"]
