import numpy as np
import pytest

from pipeline.demo.truth import by_kind, judge, judge_cuts


def rows(*entries):
    """Makes rows of the truth from (name, kind, good, picture). A row's url is its name."""
    return [{"url": n, "caption": "c", "kind": k, "good": g, "picture": p} for n, k, g, p in entries]


def run(truth, drops):
    drops = {(name, "c"): drop for name, drop in drops.items()}
    kept = {(row["url"], "c") for row in truth} - set(drops)
    score = judge(truth, kept, drops)
    return score, {kind.kind: kind for kind in score.kinds}


def test_precision_and_recall_by_kind():
    truth = rows(
        ("a", "clean", True, 0), ("b", "clean", True, 1), ("c", "clean", True, 2), ("d", "clean", True, 3),
        ("x", "mismatched", False, 4), ("y", "mismatched", False, 5),
        ("z", "dead", False, 6),
    )  # fmt: skip
    cut = ("threshold", "threshold")
    score, kinds = run(truth, {"x": cut, "d": cut, "c": ("balance", "balance"), "z": ("download", "http_404")})
    assert (kinds["mismatched"].recall, kinds["mismatched"].precision) == (0.5, 0.5)
    assert kinds["mismatched"].caught_by == cut
    assert (kinds["dead"].recall, kinds["dead"].precision) == (1.0, 1.0)
    # c was dropped by balancing, so it is not lost: two of three were kept.
    assert (kinds["clean"].kept, kinds["clean"].thinned) == (2, 1)
    assert kinds["clean"].recall == pytest.approx(2 / 3)
    assert (score.precision, score.recall) == pytest.approx((2 / 3, 2 / 3))


def test_a_copy_may_stand_for_its_original():
    truth = rows(("a", "clean", True, 0), ("copy", "near_copy", False, 0), ("b", "clean", True, 1))
    score, kinds = run(truth, {"a": ("near_dedup", "near_dedup")})
    assert kinds["clean"].recall == 1.0
    assert kinds["near_copy"].recall == 1.0
    assert score.precision == 1.0


def test_keeping_two_rows_of_one_picture_lowers_precision():
    truth = rows(("a", "clean", True, 0), ("copy", "exact_copy", False, 0))
    score, kinds = run(truth, {})
    assert kinds["exact_copy"].recall == 0.0
    assert kinds["exact_copy"].caught_by is None
    assert score.precision == 0.5


def test_a_copy_dropped_last_decides_the_outcome_of_its_picture():
    truth = rows(("a", "clean", True, 0), ("copy", "exact_copy", False, 0))
    _, kinds = run(truth, {"a": ("exact_dedup.2", "exact_dedup"), "copy": ("threshold", "threshold")})
    assert kinds["clean"].recall == 0.0
    assert kinds["exact_copy"].caught_by == ("exact_dedup.2", "exact_dedup")


def test_unbalanced_books_are_an_error():
    truth = rows(("a", "clean", True, 0))
    with pytest.raises(ValueError, match="neither kept nor dropped"):
        judge(truth, set(), {})
    with pytest.raises(ValueError, match="both kept and dropped"):
        judge(truth, {("a", "c")}, {("a", "c"): ("threshold", "threshold")})


def test_cuts_are_judged_among_the_candidates():
    truth = rows(
        ("a", "clean", True, 0), ("b", "clean", True, 1), ("x", "mismatched", False, 2),
        ("copy of a", "near_copy", False, 0), ("copy of c", "near_copy", False, 3), ("c", "clean", True, 3),
    )  # fmt: skip
    candidates = [(name, "c") for name in ("a", "b", "x", "copy of a", "copy of c")]  # c itself was dropped before
    kept = np.array([[1, 1, 1, 1, 1], [1, 0, 0, 0, 1], [0, 0, 1, 1, 0], [0, 0, 0, 0, 0]], bool)
    assert judge_cuts(truth, candidates, kept) == [(3 / 5, 1), (1, 2 / 3), (0, 0), (1, 0)]


def test_kinds_of_another_web_come_after_those_of_the_demo():
    truth = rows(
        ("a", "watermarked", False, 0), ("b", "blurred", False, 1), ("c", "dead", False, 2), ("d", "clean", True, 3)
    )
    assert [row["kind"] for row in by_kind(truth)] == ["clean", "dead", "blurred", "watermarked"]
