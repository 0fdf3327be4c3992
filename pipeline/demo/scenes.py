"""Scenes: small posters of shapes in front of landscapes, drawn from a seed.

A `Scene` holds a few attributes: objects, their positions, colours and textures, and a background. `draw` renders it,
`pipeline.demo.captions` describes it. Concepts are long-tailed, as on the web: the most frequent pair of colour and
shape is about forty times as frequent as the rarest.
"""

from __future__ import annotations

import colorsys
import math
import random
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
from PIL import Image, ImageChops, ImageDraw, ImageFilter

# From frequent to rare.
SHAPES = (
    "star", "circle", "heart", "square", "flower", "triangle",
    "fish", "ring", "crescent", "mushroom", "cross", "drop",
)  # fmt: skip
COLOURS = {  # hue in degrees, saturation, value
    "red": (356, 0.82, 0.87),
    "blue": (218, 0.78, 0.88),
    "yellow": (48, 0.85, 0.98),
    "green": (130, 0.68, 0.66),
    "white": (45, 0.04, 0.98),
    "orange": (25, 0.90, 0.96),
    "purple": (272, 0.65, 0.72),
    "black": (230, 0.25, 0.16),
    "pink": (335, 0.45, 0.98),
    "turquoise": (176, 0.72, 0.80),
}
TEXTURES = ("plain", "striped", "dotted", "checkered", "speckled")
SIZES = {"small": 0.50, "medium-sized": 0.62, "large": 0.76}  # diameter, as a share of the shorter side
RELATIONS = {"above": (0, -1), "below": (0, 1), "to the left of": (-1, 0), "to the right of": (1, 0)}

SHAPE_TAIL, COLOUR_TAIL = 0.6, 0.7  # exponents of the two Zipf laws
SUPERSAMPLING = 4  # of outlines, in each direction

Pixels = np.ndarray  # float32 (height, width, 3) in 0…1, or (height, width) for masks


@dataclass(frozen=True)
class Scene:
    """The content of a picture. `companion` is a (colour, shape); the main object is at `relation` to it."""

    shape: str
    colour: str
    texture: str
    size: str
    count: int
    background: str
    companion: tuple[str, str] | None = None
    relation: str | None = None
    seed: int = 0

    @property
    def concept(self) -> str:
        return f"{self.colour} {self.shape}"

    def differs_from(self, other: Scene) -> bool:
        """True if a caption of one is clearly wrong for the other: they share nothing that a caption names."""
        return self.background != other.background and not (self._words & other._words)

    def mismatch(self, scenes: list[Scene], rng: random.Random) -> Scene:
        """A random one of `scenes` that differs from this one. Never returns if there is none."""
        while not self.differs_from(other := rng.choice(scenes)):
            pass
        return other

    @property
    def _words(self) -> set[str]:
        return {self.shape, self.colour, *(self.companion or ())}


def zipf(items: tuple[str, ...] | list[str], exponent: float, rng: random.Random) -> str:
    """One of `items` with probability proportional to 1 / rank ** exponent."""
    return rng.choices(items, [rank**-exponent for rank in range(1, len(items) + 1)])[0]


def random_scene(rng: random.Random) -> Scene:
    shape, colour = zipf(SHAPES, SHAPE_TAIL, rng), zipf(list(COLOURS), COLOUR_TAIL, rng)
    scene = Scene(
        shape=shape,
        colour=colour,
        texture=rng.choices(TEXTURES, (6, 2, 2, 1, 1))[0],
        size=rng.choice(list(SIZES)),
        count=rng.choices((1, 2, 3, 4, 5), (70, 12, 9, 5, 4))[0],
        background=rng.choice(list(BACKGROUNDS)),
        seed=rng.getrandbits(48),
    )
    if scene.count > 1 or rng.random() < 0.7:
        return scene
    other = (
        zipf([c for c in COLOURS if c != colour], COLOUR_TAIL, rng),
        zipf([s for s in SHAPES if s != shape], SHAPE_TAIL, rng),
    )
    return replace(scene, companion=other, relation=rng.choice(list(RELATIONS)))


def class_scene(colour: str, shape: str, rng: random.Random) -> Scene:
    """A scene with only one kind of object, so that its class is unambiguous."""
    return replace(random_scene(rng), colour=colour, shape=shape, companion=None, relation=None)


def draw(scene: Scene) -> Image.Image:
    """The picture of a scene: RGB, sides of 176 to 240 pixels. The same scene gives the same pixels."""
    rng = random.Random(scene.seed)
    # Nearly square: a dual encoder sees only the central square crop.
    width, height = rng.choice(((240, 192), (224, 192), (208, 176), (208, 208), (176, 176), (192, 240), (176, 208)))
    canvas = BACKGROUNDS[scene.background](height, width, rng)
    for spot in _arrange(scene, width, height, rng):
        _place(canvas, spot, rng)
    vignette = _radius(height, width, 0.5, 0.5)[..., None]
    canvas *= 1 - 0.16 * np.clip(vignette - 0.55, 0, 1)
    return Image.fromarray((np.clip(canvas, 0, 1) * 255 + 0.5).astype(np.uint8))


# --- landscapes ----------------------------------------------------------------------------------------------------


def _rgb(code: str) -> Pixels:
    return np.array([int(code[i : i + 2], 16) for i in (0, 2, 4)], np.float32) / 255


def _gradient(height: int, width: int, *stops: str) -> Pixels:
    """A vertical gradient through `stops`, from the top."""
    where = np.linspace(0, len(stops) - 1, height)
    colours = np.stack([_rgb(stop) for stop in stops])
    column = np.stack([np.interp(where, range(len(stops)), colours[:, c]) for c in range(3)], axis=-1)
    return np.repeat(column[:, None, :], width, axis=1).astype(np.float32)


def _radius(height: int, width: int, x: float, y: float) -> Pixels:
    """Distance of every pixel from a point given as shares of the sides, in units of the shorter side."""
    side = min(height, width)
    dy = (np.arange(height, dtype=np.float32) - y * height) / side
    dx = (np.arange(width, dtype=np.float32) - x * width) / side
    return np.hypot(dy[:, None], dx[None, :])


def _blend(canvas: Pixels, alpha: Pixels, colour: Pixels) -> None:
    canvas += alpha[..., None] * (colour - canvas)


def _glow(canvas: Pixels, x: float, y: float, reach: float, colour: str, strength: float) -> None:
    height, width = canvas.shape[:2]
    _blend(canvas, strength * np.exp(-((_radius(height, width, x, y) / reach) ** 2)), _rgb(colour))


def _wave(width: int, level: float, swing: float, rng: random.Random, waves: float = 1.5) -> Pixels:
    """A smooth line across the picture, as its height in every column."""
    x = np.linspace(0, 2 * math.pi, width, dtype=np.float32)
    line = np.full(width, level, np.float32)
    for octave in (1, 2, 4):
        line += swing / octave * np.sin(x * waves * octave * rng.uniform(0.6, 1.2) + rng.uniform(0, 6.3))
    return line


def _jagged(width: int, level: float, swing: float, rng: random.Random, peaks: int) -> Pixels:
    knots = np.linspace(0, width - 1, 2 * peaks + 1)
    heights = [level + swing * (rng.uniform(-1, -0.3) if i % 2 else rng.uniform(0.2, 0.8)) for i in range(len(knots))]
    return np.interp(np.arange(width), knots, heights).astype(np.float32)


def _ground(canvas: Pixels, line: Pixels, top: str, bottom: str) -> None:
    """Fills everything under `line`, from `top` at the line to `bottom` half a picture further down."""
    height = canvas.shape[0]
    start = min(max(0, int(line.min()) - 1), height)
    depth = np.arange(start, height, dtype=np.float32)[:, None] - line[None, :].astype(np.float32)
    colour: Pixels = _rgb(top)
    if bottom != top:
        colour = colour + np.clip(depth / (0.5 * height), 0, 1)[..., None] * (_rgb(bottom) - colour)
    _blend(canvas[start:], np.clip(depth + 0.5, 0, 1), colour)


def _disc(canvas: Pixels, x: float, y: float, size: float, soft: float, colour: str, strength: float) -> None:
    """Draws a disc around (x, y) with radius `size` and an edge `soft` wide, all in pixels."""
    height, width = canvas.shape[:2]
    reach = math.ceil(size + soft)
    rows = slice(min(max(0, int(y) - reach), height), max(0, int(y) + reach + 1))
    columns = slice(min(max(0, int(x) - reach), width), max(0, int(x) + reach + 1))
    part = canvas[rows, columns]
    dy = np.arange(rows.start, rows.start + part.shape[0], dtype=np.float32) - y
    dx = np.arange(columns.start, columns.start + part.shape[1], dtype=np.float32) - x
    inside = np.clip((size - np.hypot(dy[:, None], dx[None, :])) / soft + 0.5, 0, 1)
    _blend(part, strength * inside, _rgb(colour))


def _sprinkle(canvas: Pixels, count: int, colour: str, sizes: tuple[float, float], rng: random.Random) -> None:
    """Scatters discs over the picture, with radii in the range `sizes` (pixels) and random transparency."""
    height, width = canvas.shape[:2]
    for _ in range(count):
        x, y, size = rng.uniform(0, width), rng.uniform(0, height), rng.uniform(*sizes)
        _disc(canvas, x, y, size, 1, colour, rng.uniform(0.25, 0.9))


def _clouds(canvas: Pixels, count: int, rng: random.Random) -> None:
    """Draws clouds of four soft puffs each in the upper part of the picture."""
    height, width = canvas.shape[:2]
    for _ in range(count):
        x, y, size = rng.uniform(0, width), rng.uniform(0.05, 0.4) * height, rng.uniform(0.05, 0.1) * min(height, width)
        for puff in (-1.5, -0.5, 0.5, 1.5):
            _disc(
                canvas, x + puff * size * 0.8, y + rng.uniform(-0.3, 0.1) * size, 0.7 * size, 0.6 * size, "ffffff", 0.55
            )


def _sunset(height: int, width: int, rng: random.Random) -> Pixels:
    stops = rng.choice((("3b2a5c", "a8456b", "f08a5d", "ffd39a"), ("27345c", "7d4f86", "e8737a", "ffc58f")))
    canvas = _gradient(height, width, *stops)
    _glow(canvas, rng.uniform(0.1, 0.9), rng.uniform(0.55, 0.75), 0.45, "fff0b8", 0.85)
    for depth, colour in enumerate(("8a4a6a", "5e3560", "3a2450")):
        line = _wave(width, height * (0.68 + 0.1 * depth + rng.uniform(-0.03, 0.05)), height * 0.04, rng)
        _ground(canvas, line, colour, "24163a")
    return canvas


def _sea(height: int, width: int, rng: random.Random) -> Pixels:
    canvas = _gradient(height, width, *rng.choice((("8fd0ee", "d8f1f7"), ("f6d6c9", "fdf1df"), ("a7c4e8", "eef3f7"))))
    _glow(canvas, rng.uniform(0, 1), rng.uniform(0.05, 0.35), 0.5, "ffffff", 0.8)
    horizon = rng.uniform(0.42, 0.66)
    for depth, colour in enumerate(("4aa3c7", "3189b3", "1f6f9f", "15578a", "0f4577")):
        share = horizon + (1 - horizon) * (depth / 5) ** 1.3
        swing = height * 0.008 * (depth > 0) * (1 + depth)
        line = _wave(width, height * share, swing, rng, waves=4)
        _ground(canvas, line - 1.6, "d9f3f7", colour)
        _ground(canvas, line, colour, colour)
    return canvas


def _hills(height: int, width: int, rng: random.Random) -> Pixels:
    canvas = _gradient(height, width, *rng.choice((("7fc4f0", "dff3fb"), ("bfe3e0", "fbf6dd"), ("9fb9ec", "fbe3e6"))))
    _clouds(canvas, 3, rng)
    for depth, (top, bottom) in enumerate((("a9d08a", "86b96d"), ("86bd68", "5c9a4f"), ("5fa052", "34703c"))):
        line = _wave(width, height * (0.55 + 0.14 * depth + rng.uniform(-0.05, 0.05)), height * 0.06, rng, waves=1)
        _ground(canvas, line, top, bottom)
    return canvas


def _desert(height: int, width: int, rng: random.Random) -> Pixels:
    canvas = _gradient(height, width, *rng.choice((("f2c48d", "fdebc8"), ("8ec6d8", "fbe6c4"), ("e6a08a", "fbdcae"))))
    _glow(canvas, rng.uniform(0, 1), rng.uniform(0.1, 0.3), 0.3, "fff8dc", 0.9)
    for depth, (top, bottom) in enumerate((("e9b872", "d99a57"), ("dea25c", "b9763f"), ("cd8546", "96572f"))):
        line = _wave(width, height * (0.58 + 0.13 * depth + rng.uniform(-0.05, 0.04)), height * 0.07, rng, waves=0.7)
        _ground(canvas, line, top, bottom)
    return canvas


def _mountains(height: int, width: int, rng: random.Random) -> Pixels:
    canvas = _gradient(height, width, *rng.choice((("6fa8dc", "e3eef7"), ("5b6aa0", "f3d5d8"), ("88a9b8", "eef0ea"))))
    for depth, (rock, shade) in enumerate((("a9b8cf", "8ea1bf"), ("7c8fb2", "5b6d92"))):
        level = height * (0.52 + 0.18 * depth)
        ridge = _jagged(width, level, height * (0.30 - 0.08 * depth), rng, rng.randint(2, 4))
        _ground(canvas, ridge, "ffffff", "f2f6fb")
        snow = _jagged(width, 0, height * 0.025, rng, 14)
        _ground(canvas, ridge + height * 0.10 + np.abs(ridge - level) * 0.15 + snow, rock, shade)
    _ground(canvas, _wave(width, height * 0.88, height * 0.02, rng), "eef3f8", "d5e0ec")
    return canvas


def _night(height: int, width: int, rng: random.Random) -> Pixels:
    canvas = _gradient(height, width, *rng.choice((("0b1030", "1f2a5c", "43508c"), ("150c2e", "3a2058", "6b3a78"))))
    _glow(canvas, rng.uniform(0, 1), rng.uniform(0, 0.7), 0.5, rng.choice(("5666b8", "7a4fa0", "3f7f9f")), 0.6)
    _sprinkle(canvas, 90, "f4f1ff", (0.2, 1.0), rng)
    _ground(canvas, _wave(width, height * rng.uniform(0.86, 0.94), height * 0.03, rng), "10132b", "05060f")
    return canvas


def _forest(height: int, width: int, rng: random.Random) -> Pixels:
    canvas = _gradient(height, width, *rng.choice((("cfe8e4", "f6f5dc"), ("b9d3ea", "eaf3ea"), ("f3d9c3", "f7f0da"))))
    x = np.arange(width, dtype=np.float32)
    for depth, (top, bottom) in enumerate((("8fb8a6", "7aa892"), ("4f8a72", "3d7560"), ("235947", "123b30"))):
        hills = _wave(width, height * (0.66 + 0.12 * depth), height * 0.03, rng)
        line = hills.copy()
        tree = width * (0.05 + 0.025 * depth)
        for centre in np.arange(0, width + tree, tree * 0.8):
            centre += rng.uniform(-0.3, 0.3) * tree
            tall = height * rng.uniform(0.12, 0.24) * (0.7 + 0.25 * depth)
            # Three tiers of branches: a downward sawtooth.
            away = np.abs(x - centre) / (tree * 0.55)
            tiers = 1 - away - 0.12 * ((away * 3) % 1)
            line = np.minimum(line, hills - np.where(away < 1, tall * tiers, 0))
        _ground(canvas, line, top, bottom)
    return canvas


def _city(height: int, width: int, rng: random.Random) -> Pixels:
    dusk = rng.random() < 0.5
    canvas = _gradient(height, width, *(("4a4e82", "c77f94", "f8c9a0") if dusk else ("a9cfe8", "e8f1f5")))
    for depth, colour in enumerate(("8d83a8", "5f587f", "373253") if dusk else ("b5c5d5", "8499b0", "52677f")):
        line = np.full(width, height, np.float32)
        at = -rng.uniform(0, width * 0.1)
        while at < width:
            wide = width * rng.uniform(0.06, 0.13)
            roof = height * (0.56 + 0.13 * depth + rng.uniform(-0.14, 0.1))
            line[max(0, int(at)) : max(0, int(at + wide) - rng.choice((0, 1)))] = roof
            at += wide
        _ground(canvas, line, colour, colour)
        if depth:
            for _ in range(26):
                column, floor = rng.randrange(3, width - 4), rng.randrange(int(height * 0.6), height - 4)
                if floor > line[column] + 4 and line[column] == line[column + 2]:
                    canvas[floor : floor + 3, column : column + 2] = _rgb("ffe6a3" if dusk else "dcebf5")
    return canvas


def _water(height: int, width: int, rng: random.Random) -> Pixels:
    canvas = _gradient(height, width, *rng.choice((("7fe0de", "2c9fc0", "0e4d80"), ("9be7c9", "2fa39d", "0d4f63"))))
    y, x = np.mgrid[0:height, 0:width].astype(np.float32)
    source = rng.uniform(0, width)
    angle = np.arctan2(x - source, y + 0.4 * height)
    rays = np.clip(np.sin(angle * rng.uniform(14, 20) + rng.uniform(0, 6)), 0, 1) * np.clip(1 - y / height, 0, 1)
    _blend(canvas, 0.30 * rays, _rgb("f0ffff"))
    _sprinkle(canvas, 16, "d5fbff", (1, 4.5), rng)
    _ground(canvas, _wave(width, height * rng.uniform(0.85, 0.93), height * 0.03, rng), "d9c38d", "9a8a62")
    return canvas


def _paper(height: int, width: int, rng: random.Random) -> Pixels:
    light, dark = rng.choice((("fbf3e4", "f0dfc4"), ("eaf4f1", "cfe3de"), ("f7e9ee", "ecd0da"), ("ecebf7", "d3d1ea")))
    canvas = _gradient(height, width, light, dark)
    for _ in range(rng.randint(2, 4)):
        tint = rng.choice(("ffffff", dark, "f8d7b5", "cfe0ee", "e8d5ee"))
        _glow(canvas, rng.uniform(0, 1), rng.uniform(0, 1), rng.uniform(0.2, 0.6), tint, 0.7)
    grain = np.random.default_rng(rng.getrandbits(32)).normal(0, 0.012, (height, width, 1))
    return canvas + grain.astype(np.float32)


BACKGROUNDS: dict[str, Callable[[int, int, random.Random], Pixels]] = {
    "sunset": _sunset,
    "sea": _sea,
    "hills": _hills,
    "desert": _desert,
    "mountains": _mountains,
    "night": _night,
    "forest": _forest,
    "city": _city,
    "water": _water,
    "paper": _paper,
}

# --- objects -------------------------------------------------------------------------------------------------------


@dataclass
class Spot:
    """One object on the canvas: `x`, `y` its centre and `side` its diameter, in pixels."""

    shape: str
    colour: str
    texture: str
    x: float
    y: float
    side: float


def _arrange(scene: Scene, width: int, height: int, rng: random.Random) -> list[Spot]:
    shorter = min(width, height)
    side = SIZES[scene.size] * rng.uniform(0.92, 1.08) * shorter

    def spot(x: float, y: float, side: float) -> Spot:
        room_x, room_y = min(0.48 * side, width / 2), min(0.48 * side, height / 2)
        x, y = min(max(x, room_x), width - room_x), min(max(y, room_y), height - room_y)
        return Spot(scene.shape, scene.colour, scene.texture, x, y, side)

    if scene.companion and scene.relation:
        dx, dy = RELATIONS[scene.relation]
        side = min(side, 0.56 * shorter)
        lean = rng.uniform(-0.12, 0.12)
        main = spot(
            width * (0.5 + 0.25 * dx + lean * (dx == 0)),
            height * (0.5 + 0.25 * dy + lean * (dy == 0)),
            side,
        )
        colour, shape = scene.companion
        other = spot(
            width * (0.5 - 0.27 * dx + rng.uniform(-0.2, 0.2) * (dx == 0)),
            height * (0.5 - 0.27 * dy + rng.uniform(-0.2, 0.2) * (dy == 0)),
            0.32 * shorter,
        )
        other.shape, other.colour, other.texture = shape, colour, "plain"
        return [other, main]
    if scene.count == 1:
        return [spot(rng.uniform(0.25, 0.75) * width, rng.uniform(0.25, 0.7) * height, side)]
    side = (0.24 + 0.34 * SIZES[scene.size]) * shorter * (0.95 if scene.count < 4 else 0.8)
    spots: list[Spot] = []
    for _ in range(400):
        new = spot(rng.uniform(0, width), rng.uniform(0, height), side)
        if all(math.hypot(new.x - s.x, new.y - s.y) > 0.98 * max(side, s.side) for s in spots):
            spots.append(new)
        else:
            side *= 0.995  # shrink until all objects fit
        if len(spots) == scene.count:
            break
    for s in spots:
        s.side = side
    return spots


def _place(canvas: Pixels, spot: Spot, rng: random.Random) -> None:
    side = round(spot.side)
    margin = max(6, side // 5)
    box = side + 2 * margin
    mask = _outline(spot.shape, side, rng)
    padded = Image.new("L", (box, box))
    padded.paste(mask, (margin, margin))
    alpha = np.asarray(padded, np.float32) / 255
    soft = np.asarray(padded.filter(ImageFilter.GaussianBlur(side * 0.07)), np.float32) / 255

    left, top = round(spot.x - box / 2), round(spot.y - box / 2)
    drop = max(2, side // 18)
    surround = canvas[max(0, top) : top + box, max(0, left) : left + box].mean()
    # On a dark background, draw a halo instead of a shadow. It also keeps black objects visible at night.
    if surround < 0.35:
        _stamp(canvas, left, top, np.clip(1.3 * soft, 0, 1) * 0.55, np.full((box, box, 3), 0.85, np.float32))
    else:
        _stamp(canvas, left + drop, top + drop, soft * 0.42, np.full((box, box, 3), 0.06, np.float32))
    _stamp(canvas, left, top, alpha, _paint(spot, box, soft, rng))


def _stamp(canvas: Pixels, left: int, top: int, alpha: Pixels, colour: Pixels) -> None:
    """Blends a square onto the canvas, clipped to its bounds."""
    height, width = canvas.shape[:2]
    box = len(alpha)
    x0, y0, x1, y1 = max(0, left), max(0, top), min(width, left + box), min(height, top + box)
    if x0 < x1 and y0 < y1:
        part = (slice(y0 - top, y1 - top), slice(x0 - left, x1 - left))
        _blend(canvas[y0:y1, x0:x1], alpha[part], colour[part])


def _paint(spot: Spot, box: int, soft: Pixels, rng: random.Random) -> Pixels:
    """The surface of an object: its colour, lit from the upper left, under its texture."""
    hue, saturation, value = COLOURS[spot.colour]
    base = np.array(
        colorsys.hsv_to_rgb((hue + rng.uniform(-5, 5)) % 360 / 360, saturation, value * rng.uniform(0.95, 1.05)),
        np.float32,
    )
    dark = value < 0.3
    # Textures are tints of the same colour: a striped red star is still a red star.
    tint = base + (1 - base) * 0.28 if dark else base * 0.72 if value > 0.9 else base + (1 - base) * 0.42
    y, x = np.mgrid[0:box, 0:box].astype(np.float32)
    scale = max(5.0, box / rng.uniform(7, 9))
    turn = rng.uniform(-0.9, 0.9)
    u, v = x * math.cos(turn) + y * math.sin(turn), y * math.cos(turn) - x * math.sin(turn)
    pattern = {
        "plain": lambda: np.zeros((box, box), np.float32),
        "striped": lambda: _edge(np.sin(2 * math.pi * u / scale) * scale / 6),
        "dotted": lambda: _edge(0.30 * scale - np.hypot((u % scale) - scale / 2, (v % scale) - scale / 2)),
        "checkered": lambda: _edge(np.sin(math.pi * u / scale) * np.sin(math.pi * v / scale) * scale / 3),
        "speckled": lambda: _speckles(box, rng),
    }[spot.texture]()
    paint = base + pattern[..., None] * (tint - base)
    light = 1.10 - 0.26 * (x + y)[..., None] / (2 * box)
    rim = 1 - (0.10 if dark else 0.22) * np.clip(1.6 * (0.9 - soft), 0, 1)[..., None]
    return np.clip(paint * light * rim, 0, 1)


def _edge(distance: Pixels) -> Pixels:
    """An anti-aliased edge: 0…1 across one pixel around distance 0."""
    return np.clip(distance + 0.5, 0, 1)


def _speckles(box: int, rng: random.Random) -> Pixels:
    noise = np.random.default_rng(rng.getrandbits(32)).integers(0, 255, (box, box), np.uint8)
    smooth = np.asarray(Image.fromarray(noise).filter(ImageFilter.GaussianBlur(1.5)), np.float32)
    return np.clip((smooth - smooth.mean()) / (2 * smooth.std()), 0, 1)


def _outline(shape: str, side: int, rng: random.Random) -> Image.Image:
    """The shape as a smooth mask of `side` × `side` pixels."""
    big = side * SUPERSAMPLING
    turn = rng.uniform(-0.22, 0.22) + (math.pi if shape == "crescent" and rng.random() < 0.5 else 0)
    mirror = -1 if shape == "fish" and rng.random() < 0.5 else 1

    def fill(polygons: list[list[tuple[float, float]]]) -> Image.Image:
        mask = Image.new("L", (big, big))
        pen = ImageDraw.Draw(mask)
        for polygon in polygons:
            pen.polygon([_to_pixels(mirror * x, y, turn, big) for x, y in polygon], fill=255)
        return mask

    solid, holes = OUTLINES[shape]
    return ImageChops.subtract(fill(solid), fill(holes)).reduce(SUPERSAMPLING)


def _to_pixels(x: float, y: float, turn: float, big: int) -> tuple[float, float]:
    x, y = x * math.cos(turn) - y * math.sin(turn), x * math.sin(turn) + y * math.cos(turn)
    return (x * 0.94 + 1) * big / 2, (y * 0.94 + 1) * big / 2


Polygon = list[tuple[float, float]]


def _curve(x: Callable[[float], float], y: Callable[[float], float]) -> Polygon:
    """The closed curve (x(t), y(t)) for t from 0 to 2π."""
    return [(x(t), y(t)) for t in (2 * math.pi * i / 120 for i in range(120))]


def _polar(radius: Callable[[float], float], x: float = 0, y: float = 0) -> Polygon:
    """The curve around (x, y) at distance `radius(a)` in direction `a`, clockwise from the top."""
    return _curve(lambda a: x + radius(a) * math.sin(a), lambda a: y - radius(a) * math.cos(a))


def _regular(corners: int, inner: float | None = None) -> Polygon:
    """A regular polygon, or a star with inner radius `inner`. One corner points up."""
    radii = [1.0] if inner is None else [1.0, inner]
    count = corners * len(radii)
    angles = [2 * math.pi * i / count for i in range(count)]
    return [(radii[i % len(radii)] * math.sin(a), -radii[i % len(radii)] * math.cos(a)) for i, a in enumerate(angles)]


# Filled and cut-out polygons of each shape, in a square from -1 to 1 with y downwards.
OUTLINES: dict[str, tuple[list[Polygon], list[Polygon]]] = {
    "star": ([_regular(5, inner=0.45)], []),
    "circle": ([_polar(lambda a: 0.95)], []),
    "heart": (
        [
            _curve(
                lambda t: math.sin(t) ** 3,
                lambda t: -(13 * math.cos(t) - 5 * math.cos(2 * t) - 2 * math.cos(3 * t) - math.cos(4 * t)) / 15 - 0.12,
            )
        ],
        [],
    ),
    "square": ([[(-0.8, -0.8), (0.8, -0.8), (0.8, 0.8), (-0.8, 0.8)]], []),
    "flower": ([_polar(lambda a: 0.72 + 0.27 * math.cos(6 * a))], [_polar(lambda a: 0.2)]),
    "triangle": ([[(0, -0.92), (0.98, 0.78), (-0.98, 0.78)]], []),
    "fish": (
        [
            _curve(lambda t: -0.25 + 0.7 * math.cos(t), lambda t: 0.5 * math.sin(t)),
            [(0.28, 0), (0.98, -0.55), (0.82, 0), (0.98, 0.55)],
        ],
        [_polar(lambda a: 0.09, x=-0.6, y=-0.12)],
    ),
    "ring": ([_polar(lambda a: 0.97)], [_polar(lambda a: 0.55)]),
    "crescent": ([_polar(lambda a: 0.97)], [_polar(lambda a: 0.85, x=0.46, y=-0.1)]),
    "mushroom": (
        [
            _curve(lambda t: 0.95 * math.cos(math.pi + t / 2), lambda t: 0.05 + 0.9 * math.sin(math.pi + t / 2)),
            [(-0.28, 0.0), (0.28, 0.0), (0.36, 0.92), (-0.36, 0.92)],
        ],
        [_polar(lambda a: 0.15, x=-0.42, y=-0.32), _polar(lambda a: 0.18, x=0.2, y=-0.48)],
    ),
    "cross": (
        [
            [(-0.33, -0.95), (0.33, -0.95), (0.33, 0.95), (-0.33, 0.95)],
            [(-0.95, -0.33), (0.95, -0.33), (0.95, 0.33), (-0.95, 0.33)],
        ],
        [],
    ),
    "drop": ([_curve(lambda t: 0.66 * math.sin(t) * math.sin(t / 2) * 1.25, lambda t: -0.95 * math.cos(t))], []),
}
