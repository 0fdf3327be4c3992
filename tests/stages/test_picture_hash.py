from __future__ import annotations

import imagehash
import pytest
from PIL import Image

from pipeline.stages.picture_hash import PictureHash
from pipeline.step import Stage
from tests.images import encoded
from tests.tables import make_batch, run_step

NOISE = Image.effect_noise((48, 40), 80).convert("RGB")


@pytest.mark.parametrize(
    ("kind", "oracle"), [("dhash", imagehash.dhash), ("ahash", imagehash.average_hash), ("whash", imagehash.whash)]
)
def test_hashes_are_those_of_imagehash(kind: str, oracle: object) -> None:
    flats = [Image.new("RGB", (40, 40), colour) for colour in ("white", "blue", "red", "black")]
    step: Stage = PictureHash(kind=kind)  # type: ignore[arg-type]
    bodies = [encoded(NOISE), *map(encoded, flats), b"no picture", None]
    kept, drops = run_step(step, make_batch([{"image": body} for body in bodies]))
    assert kept[kind].to_pylist() == [int(str(oracle(NOISE)), 16), *[None] * 6]  # type: ignore[operator]
    assert not len(drops)
