from __future__ import annotations

import io
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

from pipeline import pool
from pipeline.recipe import RecipeError, load
from pipeline.scheduler.passes import make_passes
from pipeline.schema import is_heavy
from pipeline.stages.clip_score import CONFIG_FILE, WEIGHTS_FILE, ClipScore
from pipeline.step import split_marked
from tests.images import encoded
from tests.tables import check_filter, make_batch, run_step


def picture(seed: int, size: tuple[int, int] = (80, 64), encoding: str = "JPEG") -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (4, 5, 3), dtype=np.uint8)
    return encoded(Image.fromarray(pixels).resize(size), encoding)


def rows(n: int, first: int = 0) -> list[dict]:
    # Captions of very different lengths, so that they fall into different groups.
    return [
        {"image": picture(i), "caption": f"picture number {i} " + "of a small red thing " * (i % 7)}
        for i in range(first, first + n)
    ]


def scores(step: ClipScore, batches: list[pa.Table]) -> dict[tuple[int, int], float]:
    """Scores by unit and row."""
    step.setup()
    tables = [split_marked(step, out)[0] for out in step.stream(batches)]
    return {
        (unit, row): score
        for table in tables
        for unit, row, score in zip(*(table[c].to_pylist() for c in ("unit", "row", step.column)))
    }


def test_scores_are_the_cosines_that_the_model_gives(checkpoint: str) -> None:
    import torch

    from trainer.model import load

    batch = make_batch(rows(10))
    kept, drops = run_step(ClipScore(model=checkpoint, batch_size=4, precision="fp32"), batch)
    assert len(drops) == 0
    assert kept.schema.field("clip_score").type == pa.float32()

    model, preprocess, tokenizer = load(checkpoint)
    images = [Image.open(io.BytesIO(data)) for data in batch["image"].to_pylist()]
    with torch.inference_mode():
        image = model.encode_image(preprocess(images), normalize=True)
        text = model.encode_text(tokenizer(batch["caption"].to_pylist()), normalize=True)
    expected = (image * text).sum(-1).numpy()
    np.testing.assert_allclose(kept["clip_score"].to_numpy(), expected, atol=1e-4)
    assert len(np.unique(kept["clip_score"].to_numpy())) > 5


def test_bf16_is_within_the_stated_error(checkpoint: str) -> None:
    exact, rounded = (
        scores(ClipScore(model=checkpoint, batch_size=8, precision=precision), [make_batch(rows(40))])  # type: ignore[arg-type]
        for precision in ("fp32", "bf16")
    )
    assert max(abs(exact[at] - rounded[at]) for at in exact) < 0.02


def test_the_precision_follows_the_device(
    checkpoint: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "AVX2")
    step = ClipScore(model=checkpoint)
    step.setup()
    assert step._model.visual.conv1.weight.dtype == torch.float32
    assert capsys.readouterr().err == ""
    ClipScore(model=checkpoint, precision="bf16").setup()
    assert "warning: clip_score: this CPU emulates bf16" in capsys.readouterr().err


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_score_does_not_depend_on_its_batch(checkpoint: str, precision: str) -> None:
    step = ClipScore(model=checkpoint, batch_size=8, precision=precision)  # type: ignore[arg-type]
    one, two = make_batch(rows(21), unit=1), make_batch(rows(10, first=21), unit=2)
    together = scores(step, [one, two])
    assert len(together) == 31
    backwards = scores(step, [two.take(list(range(9, -1, -1))), one.slice(15), one.slice(0, 0), one.slice(0, 15)])
    assert backwards == together
    alone: dict = {}
    for i in range(0, 21, 5):
        alone |= scores(step, [one.slice(i, 1)])
    assert alone == {at: together[at] for at in alone}


def test_rows_of_several_units_share_batches_and_none_is_lost(checkpoint: str) -> None:
    step = ClipScore(model=checkpoint, batch_size=8)
    step.setup()
    units = [make_batch(rows(3, first=3 * unit), unit=unit) for unit in range(7)]
    out = list(step.stream(units))
    assert [len(table) for table in out] == [8, 8, 5]
    places = [place for table in out for place in zip(table["unit"].to_pylist(), table["row"].to_pylist())]
    assert places == [(unit, row) for unit in range(7) for row in range(3)]
    assert list(step.stream([])) == []


def test_embeddings_are_unit_vectors_whose_product_is_the_score(checkpoint: str) -> None:
    step = ClipScore(model=checkpoint, batch_size=4, embeddings=True)
    assert step.adds["image_embedding"] == pa.list_(pa.float16(), 128)
    kept, _ = run_step(step, make_batch(rows(6)))
    assert {name: kept.schema.field(name).type for name in step.adds} == step.adds
    assert is_heavy(step.adds["text_embedding"])
    image, text = (np.array(kept[name].to_pylist(), np.float32) for name in ("image_embedding", "text_embedding"))
    np.testing.assert_allclose(np.linalg.norm(image, axis=1), 1, atol=2e-3)
    np.testing.assert_allclose((image * text).sum(1), kept["clip_score"].to_numpy(), atol=2e-3)


def test_several_models_in_one_recipe() -> None:
    step = ClipScore(model="ViT-L-14", column="clip_score_l14", embeddings=True)
    assert list(step.adds) == ["clip_score_l14", "clip_score_l14_image_embedding", "clip_score_l14_text_embedding"]
    assert step.adds["clip_score_l14_image_embedding"].list_size == 768


def test_the_scores_of_two_models_are_filtered_in_one_recipe(tmp_path: Path) -> None:
    (tmp_path / "pool.csv").write_text("url,caption\nhttp://a/1,one\n")
    (tmp_path / "r.yaml").write_text(
        f"""
name: two
run: {tmp_path}/run
pool: {{path: {tmp_path}/pool.csv}}
steps:
  - download
  - clip_score: {{embeddings: true}}
  - clip_score: {{model: ViT-L-14, column: l14, embeddings: true}}
  - neg_clip_loss
  - neg_clip_loss: {{image_vector: l14_image_embedding, text_vector: l14_text_embedding, column: l14_neg}}
  - threshold: {{column: l14, min: 0.2}}
  - threshold: {{column: l14_neg, top_fraction: 0.3}}
"""
    )
    passes = make_passes(load(str(tmp_path / "r.yaml"), pool_columns=pool.columns), {}, {})
    assert [p.labels for p in passes[1:]] == [
        ["download"],
        ["clip_score"],
        ["clip_score.2"],
        ["neg_clip_loss"],
        ["neg_clip_loss.2", "threshold"],
        ["threshold.2"],
    ]
    (tmp_path / "r.yaml").write_text((tmp_path / "r.yaml").read_text().replace("text_vector: l14_text_embedding, ", ""))
    with pytest.raises(RecipeError, match="l14_image_embedding has 768 dimensions, and text_embedding has 512"):
        load(str(tmp_path / "r.yaml"), pool_columns=pool.columns)


def test_only_the_picture_that_cannot_be_decoded_is_dropped(checkpoint: str) -> None:
    good = rows(4)
    whole = picture(9)
    vector = b"<svg xmlns='http://www.w3.org/2000/svg'/>"
    broken = [b"", b"not a picture", whole[: len(whole) // 2], None, vector, picture(9, encoding="BMP")]
    mixed = [*good[:2], *({"image": data} for data in broken), *good[2:]]
    step = ClipScore(model=checkpoint, batch_size=4, embeddings=True)
    check_filter(step, mixed, [None, None, *["decode_error"] * len(broken), None, None])
    kept, drops = run_step(step, make_batch(mixed))
    expected, _ = run_step(step, make_batch(good))
    assert kept["clip_score"].to_pylist() == expected["clip_score"].to_pylist()
    assert all(drops["detail"].to_pylist())


def test_odd_captions_and_pictures_are_scored(checkpoint: str) -> None:
    odd = [
        {"caption": c} for c in ("", None, "x" * 100_000, "狗" * 5000, "\0\n\u202e", "<|endoftext|> a <|startoftext|>")
    ]
    odd = [row | {"image": picture(0)} for row in odd]
    odd += [
        {"image": picture(1, size, encoding)} for size in ((3, 600), (600, 3)) for encoding in ("PNG", "WEBP", "GIF")
    ]
    kept, drops = run_step(ClipScore(model=checkpoint, batch_size=8), make_batch(odd))
    assert len(drops) == 0
    assert all(-1 <= score <= 1 for score in kept["clip_score"].to_pylist())


def test_an_abandoned_stream_ends_its_threads(checkpoint: str) -> None:
    import threading

    step = ClipScore(model=checkpoint, batch_size=2)
    step.setup()
    before = threading.active_count()
    stream = step.stream([make_batch(rows(12))])
    next(stream)
    stream.close()  # type: ignore[attr-defined]
    assert threading.active_count() == before


def test_the_fingerprint_follows_the_weights(checkpoint: str, tmp_path: Path) -> None:
    for name in (CONFIG_FILE, WEIGHTS_FILE):
        (tmp_path / name).write_bytes((Path(checkpoint) / name).read_bytes())
    step = ClipScore(model=str(tmp_path))
    assert step.fingerprint() == ClipScore(model=checkpoint).fingerprint()
    with (tmp_path / WEIGHTS_FILE).open("ab") as file:
        file.write(b"\0")
    assert step.fingerprint() != ClipScore(model=checkpoint).fingerprint()


@pytest.mark.parametrize(
    ("options", "key", "hint"),
    [
        ({"model": "ViT-B-23"}, "model", "did you mean"),
        ({"model": "no/such/folder"}, "model", "no folder"),
        ({"pretrained": "opneai"}, "pretrained", "did you mean openai"),
        ({"model": "ViT-H-14", "pretrained": "laion2b_s32b_b79x"}, "pretrained", "laion2b_s32b_b79k"),
        ({"model": "hf-hub:someone/model", "embeddings": True}, "embeddings", "dimension"),
        ({"column": "clip score"}, "column", "name"),
        ({"batch_size": 0}, "batch_size", "1 to 65,536"),
        ({"decode_threads": 0}, "decode_threads", "1 to 1,024"),
    ],
)
def test_invalid_options_are_reported(options: dict, key: str, hint: str) -> None:
    [(found, problem)] = ClipScore(**options).check()
    assert found == key
    assert hint in problem


@pytest.mark.parametrize(
    "options", [{}, {"model": "ViT-B/32"}, {"model": "ViT-H-14", "pretrained": "laion2b_s32b_b79k"}]
)
def test_published_models_are_accepted(options: dict) -> None:
    assert list(ClipScore(**options).check()) == []


def test_a_folder_is_checked_for_its_files(tmp_path: Path, checkpoint: str) -> None:
    assert list(ClipScore(model=checkpoint).check()) == []
    assert [key for key, _ in ClipScore(model=checkpoint, pretrained="openai").check()] == ["pretrained"]
    problems = list(ClipScore(model=str(tmp_path)).check())
    assert [CONFIG_FILE in problems[0][1], WEIGHTS_FILE in problems[1][1]] == [True, True]
    (tmp_path / CONFIG_FILE).write_text("[]")
    (tmp_path / WEIGHTS_FILE).write_bytes(b"")
    [(key, problem)] = ClipScore(model=str(tmp_path), embeddings=True).check()
    assert key == "model"
    assert "embed_dim" in problem


def test_checking_a_recipe_does_not_import_torch() -> None:
    code = (
        "import sys; from pipeline.stages.clip_score import ClipScore; s = ClipScore(embeddings=True);"
        "assert not list(s.check()); s.fingerprint(); sys.exit('torch' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
