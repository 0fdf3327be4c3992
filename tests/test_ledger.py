from __future__ import annotations

import pyarrow as pa
import pytest

from pipeline.ledger import BooksError, Funnel
from pipeline.schema import DROP


def drops(*rows: tuple[str, str]) -> pa.Table:
    return pa.Table.from_pylist(
        [
            {"unit": 0, "row": i, "step": step, "reason": reason, "detail": None}
            for i, (step, reason) in enumerate(rows)
        ],
        DROP,
    )


def test_funnels_of_units_add_up_to_the_funnel_of_the_run() -> None:
    first = Funnel.of(["a", "b"], 10, [drops(("a", "x"), ("a", "y"), ("b", "z"))], {"a": 1.0})
    second = Funnel.of(["a", "b"], 5, [drops(("a", "x"))], {"a": 0.5, "b": 2.0})
    total = Funnel()
    total.add(first)
    total.add(second)
    total.balance()
    assert (total.rows_in, total.kept) == (15, 11)
    assert total.lines["a"].dropped == {"x": 2, "y": 1}
    assert total.lines["b"].rows_in == 12
    assert total.lines["a"].seconds == 1.5
    assert Funnel.from_json(total.to_json()) == total


def test_a_lost_row_raises() -> None:
    funnel = Funnel.of(["a"], 10, [], {})
    funnel.add(Funnel.of(["b"], 9, [], {}))
    with pytest.raises(BooksError, match="a kept 10 rows, but b received 9"):
        funnel.balance()
