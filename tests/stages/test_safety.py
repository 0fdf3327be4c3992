"""text_safety and image_safety: scorers by import path, word lists, and their limits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

from pipeline.stages.image_safety import ImageSafety
from pipeline.stages.text_safety import TextSafety
from tests.images import encoded
from tests.tables import check_filter, make_batch, run_step

SHOUTING, REDNESS = "tests.plugins:Shouting", "tests.plugins:Redness"


def flat(red: int) -> bytes:
    return encoded(Image.new("RGB", (20, 10), (red, 0, 0)))


def test_captions_above_the_limit_are_dropped() -> None:
    rows = [{"caption": caption} for caption in ("a red car", "A RED CAR", "A reddish car", "12", None)]
    check_filter(TextSafety(scorer=SHOUTING), rows, [None, "unsafe", None, "missing", "missing"])
    kept, drops = run_step(TextSafety(scorer=SHOUTING, max_score=None, column="shouting"), make_batch(rows))
    assert not len(drops)
    found = kept["shouting"].to_pylist()
    assert found[:2] == [0, 1]
    assert found[2] == pytest.approx(1 / 11)
    assert found[3:] == [None, None]


def test_a_score_equal_to_the_limit_is_kept_and_drops_state_the_score() -> None:
    batch = make_batch([{"caption": "Aaaaaaaaaa"}, {"caption": "Aa"}])
    kept, drops = run_step(TextSafety(scorer=SHOUTING), batch)
    assert len(kept) == 1
    assert drops["value"].to_pylist() == [0.5]


def test_a_list_of_words(tmp_path: Path) -> None:
    (tmp_path / "w.txt").write_text("rude word\nvile\n")
    rows = [{"caption": c} for c in ("a Rude, word", "rude words", "vile!", "servile", None)]
    check_filter(TextSafety(words=str(tmp_path / "w.txt")), rows, ["unsafe", None, "unsafe", None, None])


def test_pictures_above_the_limit_are_dropped() -> None:
    rows = [{"image": flat(20)}, {"image": flat(40)}, {"image": b"none"}, {"image": None}]
    check_filter(ImageSafety(scorer=REDNESS), rows, [None, "unsafe", "missing", "missing"])
    kept, _ = run_step(ImageSafety(scorer=REDNESS, max_score=None), make_batch(rows))
    np.testing.assert_allclose(kept["image_unsafe_score"].to_pylist()[:2], [20 / 255, 40 / 255], rtol=1e-6)
    assert kept["image_unsafe_score"].to_pylist()[2:] == [None, None]
    assert kept.schema.field("image_unsafe_score").type == pa.float32()


def test_an_empty_batch() -> None:
    for step in (TextSafety(scorer=SHOUTING), ImageSafety(scorer=REDNESS)):
        step.setup()
        assert len(step.process(make_batch([{"image": flat(1)}]).slice(0, 0))) == 0


@pytest.mark.parametrize(
    ("scorer", "message"),
    [("tests.plugins:Broken", "expected scores from 0 to 1, found 7.0"),
     ("tests.plugins:Short", r"expected 2 scores, found an array of shape \(1,\)")],
)  # fmt: skip
def test_a_scorer_that_returns_something_else(scorer: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        run_step(TextSafety(scorer=scorer), make_batch([{}, {}]))


@pytest.mark.parametrize(
    ("options", "key", "message"),
    [
        ({}, "scorer", "exactly one of `scorer` and `words` must be given, found neither"),
        ({"scorer": SHOUTING, "words": __file__}, "scorer", "found both"),
        ({"scorer": "nothing"}, "scorer", "expected an import path"),
        ({"words": "nothing.txt"}, "words", "cannot read 'nothing.txt'"),
        ({"scorer": SHOUTING, "max_score": 10.0}, "max_score", "must be from 0 to 1, found 10.0"),
        ({"scorer": SHOUTING, "column": "a b"}, "column", "'a b' is not a valid column name"),
    ],
)
def test_unusable_options(options: dict[str, Any], key: str, message: str) -> None:
    ((found, problem),) = TextSafety(**options).check()
    assert found == key
    assert message in problem


def test_unusable_options_of_image_safety() -> None:
    problems = dict(ImageSafety(scorer="nothing", max_score=-1).check())
    assert problems.keys() == {"scorer", "max_score"}
    assert ImageSafety(scorer=REDNESS, runs_on="gpu").resource == "gpu"
