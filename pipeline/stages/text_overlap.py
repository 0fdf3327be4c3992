from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.models import plugin
from pipeline.ocr import Line
from pipeline.step import Estimate, Stage
from pipeline.text.caption import normal

_DEFAULT = "pipeline.ocr:RapidOcr"
_SHORT = 3
"""Words of at most this many letters must be read as separate words. Longer ones also match within joined words, since
OCR may miss spaces."""


@dataclass(kw_only=True)
class TextOverlap(Stage):
    """Measures how much of the caption is written in the picture, by OCR.

    Models trained on such pairs learn to read text instead of recognising what is shown. About 40% of LAION's pictures
    have text that overlaps with the caption (T-MARS, Maini et al., ICLR 2024). Adds

    - `image_text`: the lines of text in the picture, separated by line feeds; "" if there are none;
    - `text_boxes`: the box of each line, [x_min, y_min, x_max, y_max], 0 to 1;
    - `text_overlap_score`: the share of the caption's letters and digits that are in words of this text, 0 to 1; null
      for a caption without letters and digits. Ignores case and punctuation. (Lin et al., 2023, "Parrot Captions Teach
      CLIP to Spot Text", count words instead.)

    To score pictures with their text masked, as T-MARS does, add this step. Then keep the highest scores with
    `threshold`, or drop the rows that lose the most with `text_reliance`:

        - clip_score: {column: masked_clip_score, mask: text_boxes}

    Pictures that cannot be decoded are dropped (`decode_error`).
    """

    engine: str = _DEFAULT
    """Import path of an OCR engine: a class or function that is called without arguments and returns a
    `pipeline.ocr.Engine`. The default needs `pip install 'winnow-clip[ocr]'`."""

    needs = ("image", "caption")
    version = 2
    adds = {  # noqa: RUF012
        "image_text": pa.string(),
        "text_boxes": pa.list_(pa.list_(pa.float32())),
        "text_overlap_score": pa.float32(),
    }
    expensive = True

    def estimate(self, rows: float) -> Estimate:
        return Estimate(1.0, 1.2, "rate: RapidOCR on pictures of 256 pixels with two lines of text", stored=100)

    def check(self) -> Iterator[tuple[str, str]]:
        if (found := plugin.problem(self.engine)) is not None:
            yield "engine", found
        elif self.engine == _DEFAULT and not (find_spec("rapidocr") and find_spec("onnxruntime")):
            yield "engine", "requires RapidOCR, which is not installed: pip install 'winnow-clip[ocr]'"

    def setup(self) -> None:
        self._read = plugin.load(self.engine)

    def process(self, batch: pa.Table) -> pa.Table:
        read = [self._lines(image.as_buffer()) for image in batch["image"]]
        texts = ["\n".join(line.text for line in lines) if isinstance(lines, list) else None for lines in read]
        boxes = [[line.box for line in lines] if isinstance(lines, list) else None for lines in read]
        problems = [None if isinstance(lines, list) else lines for lines in read]
        columns = {
            "image_text": pa.array(texts, pa.string()),
            "text_boxes": pa.array(boxes, self.adds["text_boxes"]),
            "text_overlap_score": overlap(batch["caption"], pa.chunked_array([pa.array(texts, pa.string())])),
            "drop_reason": pa.array([problem and "decode_error" for problem in problems], pa.string()),
            "drop_detail": pa.array(problems, pa.string()),
        }
        for name, values in columns.items():
            batch = batch.append_column(name, values)
        return batch

    def _lines(self, image: pa.Buffer | None) -> list[Line] | str:
        """The lines with boxes from 0 to 1, or an error message."""
        from trainer.pictures import decode
        from trainer.shards import CorruptSampleError

        try:
            pixels = np.asarray(decode(image.to_pybytes() if image else b""))
        except CorruptSampleError as error:
            return str(error)[:200]
        height, width = pixels.shape[:2]
        scale = np.array([width, height, width, height], np.float64)
        return [Line(text, tuple(np.clip(np.asarray(box) / scale, 0, 1).tolist())) for text, box in self._read(pixels)]


def overlap(captions: pa.ChunkedArray, texts: pa.ChunkedArray) -> pa.FloatArray:
    """The share of each caption's letters and digits that are in words of its text: float32, 0 to 1."""
    scores = []
    for caption, text in zip(_words(captions), _words(texts)):
        together, apart = "".join(text), set(text)
        total = sum(map(len, caption))
        read = sum(len(word) for word in caption if word in apart or (len(word) > _SHORT and word in together))
        scores.append(read / total if total else None)
    return pa.array(scores, pa.float32())


def _words(texts: pa.ChunkedArray) -> list[list[str]]:
    """The words of each text: runs of letters, marks and digits, in lower case."""
    plain = pc.replace_substring_regex(pc.utf8_lower(normal(texts)), r"[^\pL\pM\pN]+", " ")
    return [text.split() for text in plain.to_pylist()]
