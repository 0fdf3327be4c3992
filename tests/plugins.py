"""Models that the tests of steps name by import path, as a user does."""

from __future__ import annotations

import numpy as np

from pipeline.ocr import Line


class Shouting:
    """Text scorer: the share of capitals."""

    def __call__(self, captions: list[str]) -> list[float]:
        letters = [[c for c in caption if c.isalpha()] for caption in captions]
        return [sum(c.isupper() for c in line) / len(line) if line else np.nan for line in letters]


class Redness:
    """Image scorer: the mean of red."""

    def __call__(self, pictures: list[np.ndarray]) -> list[float]:
        return [float(pixels[..., 0].mean() / 255) for pixels in pictures]


class RedBox:
    """Detector and OCR engine: the box of all red pixels, which reads "red"."""

    def __call__(self, pixels: np.ndarray) -> list[Line]:
        red = (pixels[..., 0] > 200) & (pixels[..., 1] < 80) & (pixels[..., 2] < 80)
        if not red.any():
            return []
        rows, columns = (np.flatnonzero(red.any(axis=axis)) for axis in (1, 0))
        return [Line("red", (columns[0], rows[0], columns[-1] + 1, rows[-1] + 1))]


class FaceBox(RedBox):
    """Like RedBox, with coordinates as shares of the sides of the picture."""

    def __call__(self, pixels: np.ndarray) -> list[list[float]]:  # type: ignore[override]
        height, width = pixels.shape[:2]
        return [[x0 / width, y0 / height, x1 / width, y1 / height] for _, (x0, y0, x1, y1) in super().__call__(pixels)]


class Broken:
    """Returns results that no step accepts."""

    def __call__(self, items: list) -> list[float]:
        return [7.0] * len(items)


class Short:
    def __call__(self, items: list) -> list[float]:
        return [0.5]


class Failing:
    def __call__(self, items: list) -> list[float]:
        raise RuntimeError("no such thing")
