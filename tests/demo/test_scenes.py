import random
from collections import Counter

import imagehash
import numpy as np
import pytest

from pipeline.demo import captions
from pipeline.demo.scenes import BACKGROUNDS, COLOURS, SHAPES, class_scene, draw, random_scene


def scenes(count: int, seed: int = 0) -> list:
    rng = random.Random(seed)
    return [random_scene(rng) for _ in range(count)]


def test_a_seed_gives_the_same_scenes_pixels_and_captions():
    first, second = scenes(12), scenes(12)
    assert first == second
    assert first != scenes(12, seed=1)
    for a, b in zip(first, second):
        assert draw(a).tobytes() == draw(b).tobytes()
        assert captions.english(a, random.Random(5)) == captions.english(b, random.Random(5))


def test_pictures_have_the_promised_size():
    for scene in scenes(20):
        image = draw(scene)
        assert image.mode == "RGB"
        assert 176 <= min(image.size) <= max(image.size) <= 240


def test_concepts_are_long_tailed_and_all_occur():
    drawn = scenes(4000)
    shapes, colours = Counter(s.shape for s in drawn), Counter(s.colour for s in drawn)
    assert set(shapes) == set(SHAPES)
    assert set(colours) == set(COLOURS)
    concepts = Counter(s.concept for s in drawn).most_common()
    assert concepts[0][1] > 10 * concepts[-1][1]


@pytest.mark.parametrize("background", list(BACKGROUNDS))
def test_the_main_object_shows_its_colour(background):
    rng = random.Random(3)
    for colour, channel in (("red", 0), ("green", 1), ("blue", 2)):
        scene = class_scene(colour, "circle", rng)
        scene = type(scene)(**{**vars(scene), "background": background, "count": 1, "texture": "plain"})
        pixels = np.asarray(draw(scene), int)
        others = [c for c in range(3) if c != channel]
        pure = (pixels[..., channel] > pixels[..., others[0]] + 40) & (
            pixels[..., channel] > pixels[..., others[1]] + 20
        )
        assert pure.mean() > 0.03


def test_different_scenes_are_not_near_copies():
    hashes = [imagehash.phash(draw(scene)) for scene in scenes(150)]
    assert min(a - b for i, a in enumerate(hashes) for b in hashes[:i]) > 4


def test_captions_name_the_main_object():
    rng = random.Random(0)
    for scene in scenes(500):
        noun = captions.PLURALS.get(scene.shape, scene.shape + "s") if scene.count > 1 else scene.shape
        caption = captions.english(scene, rng)
        assert f"{scene.colour} {noun}" in caption
        assert len(caption.split()) >= 3


def test_every_language_has_every_word():
    rng = random.Random(0)
    for scene in scenes(300):
        captions.foreign(scene, rng)  # a missing word raises KeyError
    for words in captions.LANGUAGES.values():
        assert set(words["shapes"]) == set(SHAPES)
        assert set(words["colours"]) == set(COLOURS)
        assert set(words["places"]) == set(BACKGROUNDS)
