"""Reads text in pictures. An engine is any callable from pixels to lines of text; recipes name its import path."""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol

import numpy as np


class Line(NamedTuple):
    """A line of text in a picture."""

    text: str
    box: tuple[float, float, float, float]
    """x_min, y_min, x_max, y_max in pixels."""


class Engine(Protocol):
    def __call__(self, pixels: np.ndarray) -> list[Line]:
        """The lines of text in (height, width, 3) uint8 RGB."""


class RapidOcr:
    """RapidOCR on onnxruntime, with the models in its wheel (PP-OCRv6 small: Latin script, Chinese, Japanese).

    Chosen because its models come with the package, so nothing is downloaded. Needs the extra `ocr`. Leaves out lines
    with a confidence below 0.5, RapidOCR's default.
    """

    def __init__(self) -> None:
        from rapidocr import RapidOCR

        # One thread per worker, since there is one worker per core.
        self._engine: Any = RapidOCR(
            params={"Global.log_level": "critical", "EngineConfig.onnxruntime.intra_op_num_threads": 1}
        )

    def __call__(self, pixels: np.ndarray) -> list[Line]:
        # Upside-down text is rare on the web, and detecting it takes a third of the time.
        found = self._engine(np.ascontiguousarray(pixels[..., ::-1]), use_cls=False)
        if found.txts is None:
            return []
        return [
            Line(text, (*box.min(axis=0).tolist(), *box.max(axis=0).tolist()))
            for text, box in zip(found.txts, found.boxes)
        ]
