"""Measures defects that make a picture useless whatever it shows: dark, overexposed, blurry, or low in information.

The scores and formulas are cleanvision's (Cleanlab, 2022; version 0.3). They range from 0 to 1; a low score means the
defect. cleanvision measures the original file, this module the stored picture. Only the entropy differs noticeably.
"""

from __future__ import annotations

import math

import cv2
import numpy as np
import pyarrow as pa

SCORES = {
    "dark_score": pa.float32(),
    "light_score": pa.float32(),
    "blurry_score": pa.float32(),
    "low_information_score": pa.float32(),
}
_LUMINANCE = np.array([[0.241, 0.691, 0.068]], np.float32)
_BLUR_SIDE = 64
_BLUR_SCALE, _BLUR_CONTRAST = 0.01, 0.18
_EDGES = np.array([[-1, -1, -1], [-1, 8, -1], [-1, -1, -1]], np.float32)
_DECIMALS = 4


def measure(pixels: np.ndarray) -> dict[str, float]:
    """The SCORES of (height, width, 3) uint8 RGB.

    - `dark_score`: the 99th percentile of brightness, √(0.241 R² + 0.691 G² + 0.068 B²) / 255.
    - `light_score`: 1 − the 5th percentile of brightness.
    - `blurry_score`: 1 − exp(−σ/100), where σ is the standard deviation of the edges when the longer side is reduced to
      64 pixels. Flat drawings have few grey values, so 1 − exp(−h/100) is added if it is above 0.18, where h is the
      standard deviation of the grey histogram. At most 1.
    - `low_information_score`: the entropy of the three channels' concatenated histograms, in bits, divided by 10.
    """
    squares = pixels.astype(np.float32)
    squares *= squares
    brightness = cv2.convertScaleAbs(cv2.sqrt(cv2.transform(squares, _LUMINANCE)))
    shares = np.cumsum(_histogram(brightness)) / brightness.size
    channels = np.concatenate([_histogram(channel) for channel in cv2.split(pixels)])
    frequent = channels[channels > 0] / channels.sum()
    scores = {
        "dark_score": np.searchsorted(shares, 0.99) / 255,
        "light_score": 1 - np.searchsorted(shares, 0.05) / 255,
        "blurry_score": _sharpness(pixels),
        "low_information_score": min(1.0, -float(frequent @ np.log2(frequent)) / 10),
    }
    return {name: round(float(score), _DECIMALS) for name, score in scores.items()}


def _sharpness(pixels: np.ndarray) -> float:
    grey = cv2.cvtColor(pixels, cv2.COLOR_RGB2GRAY)
    height, width = grey.shape
    if (ratio := max(height, width) / _BLUR_SIDE) > 1:
        size = max(int(width / ratio), 1), max(int(height / ratio), 1)
        grey = cv2.resize(grey, size, interpolation=cv2.INTER_AREA)  # cleanvision's bicubic takes five times as long
    # Like Pillow's FIND_EDGES, clip the values and leave the border unfiltered.
    edges = grey.copy()
    edges[1:-1, 1:-1] = cv2.filter2D(grey.astype(np.float32), -1, _EDGES)[1:-1, 1:-1].clip(0, 255)
    blur = 1 - math.exp(-float(edges.std()) * _BLUR_SCALE)
    contrast = 1 - math.exp(-float(_histogram(grey).std()) * _BLUR_SCALE)
    return min(1.0, blur + (contrast if contrast > _BLUR_CONTRAST else 0.0))


def _histogram(values: np.ndarray) -> np.ndarray:
    """The number of pixels with each of the 256 values of (height, width) uint8."""
    return cv2.calcHist([values], [0], None, [256], [0, 256])[:, 0]
