"""Measures how well `text_overlap` reads captions drawn on pictures, and what it reads on pictures without one.

    python benchmarks/ocr.py --pictures FOLDER --captions CSV [--count 50] [--engine pipeline.ocr:RapidOcr]

CSV has rows of `file,caption` without a header. Pictures are resized to a shorter side of 256 pixels, as shards store
them. The caption is drawn on a copy of each, in lines of up to 24 letters, at several letter heights (shares of the
height of the picture). The score is `text_overlap_score`, the share of the caption's letters in words that were read;
without a drawn caption it should be 0. Time is CPU time per picture.
"""

from __future__ import annotations

import argparse
import csv
import io
import itertools
import textwrap
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
from PIL import Image, ImageDraw

from pipeline.stages.text_overlap import TextOverlap

HEIGHTS = (0.04, 0.06, 0.10)
"""Letter heights as shares of the picture's height: 10, 15 and 26 of 256 pixels."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pictures", type=Path, required=True)
    parser.add_argument("--captions", type=Path, required=True)
    parser.add_argument("--count", type=int, default=50)
    parser.add_argument("--engine", default="pipeline.ocr:RapidOcr")
    args = parser.parse_args()
    step = TextOverlap(engine=args.engine)
    step.setup()
    with args.captions.open(newline="", encoding="utf-8") as file:
        rows = list(itertools.islice(csv.reader(file), args.count))
    scores_at: dict[float, np.ndarray] = {}
    for height in (0.0, *HEIGHTS):
        pictures = [drawn(args.pictures / name, caption, height) for name, caption in rows]
        started = time.process_time()
        batch = step.process(pa.table({"image": pictures, "caption": [caption for _, caption in rows]}))
        seconds = (time.process_time() - started) / len(rows)
        scores = scores_at[height] = batch["text_overlap_score"].to_numpy()
        label = f"letters of {height:.0%}" if height else "no caption"
        print(
            f"{label:<16} mean score {scores.mean():.3f}, at least half {(scores >= 0.5).mean():.0%}, {seconds:.2f} s"
        )
    read = " ".join(f"read_at_{height:.2f}={scores_at[height].mean():.3f}" for height in HEIGHTS)
    print(f"RESULT pictures={len(rows)} {read} without={scores_at[0.0].mean():.3f}")


def drawn(path: Path, caption: str, height: float) -> bytes:
    """Returns the picture as a JPEG, with the caption in white on a dark box unless `height` is 0."""
    picture = Image.open(path).convert("RGB")
    scale = 256 / min(picture.size)
    picture = picture.resize((round(picture.width * scale), round(picture.height * scale)))
    if height:
        size = round(picture.height * height)
        text = "\n".join(textwrap.wrap(caption, min(24, int(1.6 * picture.width / size))))  # fits the width
        draw = ImageDraw.Draw(picture)
        box = draw.multiline_textbbox((4, 4), text, font_size=size)
        draw.rectangle((0, 0, box[2] + 4, box[3] + 4), (20, 20, 20))
        draw.multiline_text((4, 4), text, "white", font_size=size)
    out = io.BytesIO()
    picture.save(out, "JPEG", quality=90)
    return out.getvalue()


if __name__ == "__main__":
    main()
