"""Captions for scenes: true ones in English and six other languages, and texts that describe nothing."""

from __future__ import annotations

import json
import random
from pathlib import Path

from pipeline.demo.scenes import Scene

NUMBERS = {2: "two", 3: "three", 4: "four", 5: "five"}
PLACES = {  # phrases for each background
    "sunset": ("at sunset", "in front of an evening sky", "at the end of a warm summer day"),
    "sea": ("over the sea", "above the blue ocean", "by the sea"),
    "hills": ("over green hills", "above the meadows in spring", "in a green valley"),
    "desert": ("in the desert", "over the sand dunes", "above the dunes"),
    "mountains": ("in front of snowy mountains", "high in the mountains", "over the snow in winter"),
    "night": ("in the night sky", "under the stars", "at night"),
    "forest": ("over a pine forest", "above the trees", "at the edge of the woods"),
    "city": ("above the city", "over the skyline of a town", "over the roofs of the city"),
    "water": ("under water", "at the bottom of the sea", "deep under the waves"),
    "paper": ("on a sheet of paper", "on a plain wall", "on a soft background"),
}
TEMPLATES = (  # half of them omit the place, so that the objects must identify the picture
    "this is a picture of {thing}",
    "I made this card with {thing} for my sister",
    "{Thing}, drawn for the children's room",
    "Art print with {thing}, framed or unframed",
    "a cheerful poster of {thing}",
    "{thing} {place}",
    "There {is_are} {thing} {place}.",
    "An illustration that shows {thing} {place}",
    "{Place} you can see {thing}",
    "{Thing}, seen {place} | wall art and posters",
)
PLURALS = {"crescent": "crescents", "fish": "fish", "cross": "crosses"}

# Other languages use a noun ("of the colour red"), which avoids agreement between colour and shape.
LANGUAGES: dict[str, dict] = json.loads(Path(__file__).with_name("languages.json").read_text(encoding="utf-8"))

BOILERPLATE = (
    "IMG_{n:04d}.jpg", "DSC{n:05d}.JPG", "PXL_2021{n:04d}_101500.jpg", "Screenshot 2021-03-{d:02d} at 10.15.00",
    "click to enlarge", "Click here to view larger image", "share this on facebook", "view full size image",
    "image {n}", "photo {n} of 12", "Image not available", "thumbnail", "March {d}, 2019", "{n}-{d}.png",
    "https://example.org/{n}.html",
)  # fmt: skip
SPAM = (
    "Free shipping on all orders over fifty dollars, shop our winter sale today",
    "Sign up for our newsletter and never miss an offer again",
    "We use cookies to give you the best experience on our website",
)


def english(scene: Scene, rng: random.Random) -> str:
    """A true caption. It always names the main object's shape and colour; other content varies."""
    thing, place = _thing(scene, rng), rng.choice(PLACES[scene.background])
    return rng.choice(TEMPLATES).format(
        thing=thing,
        Thing=thing[0].upper() + thing[1:],
        place=place,
        Place=place[0].upper() + place[1:],
        is_are="is" if scene.count == 1 else "are",
    )


def _thing(scene: Scene, rng: random.Random) -> str:
    words = [scene.colour, scene.shape]
    # Keep the colour next to the shape: "a striped red star" contains the concept "red star".
    if scene.texture != "plain" and rng.random() < 0.7:
        words.insert(0, scene.texture)
    if rng.random() < 0.4:
        words.insert(0, scene.size)
    if scene.count > 1:
        words[-1] = PLURALS.get(scene.shape, scene.shape + "s")
        return " ".join([NUMBERS[scene.count], *words])
    thing = _with_article(" ".join(words))
    if scene.companion and rng.random() < 0.7:
        thing += f" {scene.relation} {_with_article(' '.join(scene.companion))}"
    return thing


def _with_article(words: str) -> str:
    return ("an " if words[0] in "aeiou" else "a ") + words


def foreign(scene: Scene, rng: random.Random) -> str:
    """A true caption in a language other than English."""
    words = rng.choice(list(LANGUAGES.values()))
    return rng.choice(words["templates"]).format(
        shape=words["shapes"][scene.shape],
        colour=words["colours"][scene.colour],
        place=words["places"][scene.background],
    )


def boilerplate(rng: random.Random) -> str:
    return rng.choice(BOILERPLATE).format(n=rng.randint(1, 9999), d=rng.randint(1, 28))
