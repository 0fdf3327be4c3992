from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pytest

from pipeline.stages.language import Language
from tests.tables import check_filter, make_batch, run_step

ENGLISH = [
    "A brown dog runs across a field of grass with a stick in its mouth.",
    "Two children are playing on the beach next to the water",
    "TWO MEN IN HARD HATS ARE STANDING NEXT TO A TRUCK",
    "an old man sits on a bench reading a newspaper",
]
OTHER = {
    "de": "Ein brauner Hund rennt mit einem Stock im Maul über eine Wiese.",
    "fr": "Deux enfants jouent sur la plage au bord de l'eau",
    "cs": "Dva muži s přilbami stojí vedle nákladního auta.",
    "zh": "一只棕色的狗叼着一根棍子跑过草地",
    "ru": "Коричневая собака бежит по траве с палкой в зубах",
}


def test_only_listed_languages_are_kept() -> None:
    rows = [{"caption": caption} for caption in [*ENGLISH, *OTHER.values()]]
    check_filter(Language(), rows, [None] * len(ENGLISH) + ["language"] * len(OTHER))
    expected = ["language"] * len(ENGLISH) + [None if code in ("fr", "zh") else "language" for code in OTHER]
    check_filter(Language(keep=["fr", "zh"]), rows, expected)


def test_language_and_score_are_measured() -> None:
    batch = make_batch([{"caption": caption} for caption in OTHER.values()])
    kept, drops = run_step(Language(keep=None), batch)
    assert len(drops) == 0
    assert kept["language"].to_pylist() == list(OTHER)
    assert kept.schema.field("language_score").type == pa.float32()
    assert all(0.5 < score <= 1 for score in kept["language_score"].to_pylist())


def test_the_detail_of_uncertain_rows_has_the_probability() -> None:
    rows = [{"caption": "12345 ★★★"}, {"caption": None}, {"caption": " "}]
    check_filter(Language(), rows, ["low_score"] * 3)
    _, drops = run_step(Language(keep=["en"], min_score=1.0), make_batch([{"caption": "Patent Drawing no. 5"}]))
    assert drops["reason"].to_pylist() == ["low_score"]
    assert drops["detail"].to_pylist()[0].startswith("en 0.")


def test_hostile_captions_are_measured() -> None:
    text = "a brown dog runs across a field of grass"
    rows = [{"caption": text.replace(" ", white)} for white in ("\n", "\r\n", "\0", "\t", "\u2028", "\v")]
    rows += [{"caption": text * 2000}]
    check_filter(Language(), rows, [None] * len(rows))


@pytest.mark.parametrize(
    "write",
    [
        lambda text: text.replace(" ", "\u200b "),
        lambda text: "\u202d" + "\u00ad".join(text),
        lambda text: "".join(chr(ord(c) + 0xFEE0) if "!" <= c <= "~" else c for c in text),
        lambda text: "".join(chr(0x1D41A + ord(c) - 97) if "a" <= c <= "z" else c for c in text),
        lambda text: "".join(f"&#{ord(c)};" for c in text),
    ],
    ids=["zero-width", "soft hyphens", "full-width", "mathematical", "entities"],
)
def test_unusual_characters_are_normalised(write: Callable[[str], str]) -> None:
    captions = [*ENGLISH, *OTHER.values()]
    plain, _ = run_step(Language(keep=None), make_batch([{"caption": caption} for caption in captions]))
    found, _ = run_step(Language(keep=None), make_batch([{"caption": write(caption)} for caption in captions]))
    assert found["language"].to_pylist() == plain["language"].to_pylist()
    assert found["language_score"].to_pylist() == plain["language_score"].to_pylist()
    assert found["caption"].to_pylist() == [write(caption) for caption in captions]


# English that is not the most likely language, or not by much: photographs' captions, with unusual words.
UNLIKELY = ["A girl climbs a rock wall .", "An Arabic man in a white hat .", "a dirt biker lands on a ramp ."]


def test_plain_english_is_kept_by_its_own_probability() -> None:
    rows = [{"caption": caption} for caption in [*UNLIKELY, *OTHER.values()]]
    check_filter(Language(), rows, [None] * len(UNLIKELY) + ["language"] * len(OTHER))
    check_filter(Language(min_score=0.5), rows, ["language"] * len(rows))
    check_filter(Language(keep=["es", "en"]), rows[:1], [None])
    _, drops = run_step(Language(min_score=0.5), make_batch(rows[:1]))
    assert drops["detail"].to_pylist() == ["es 0.1558, en 0.1434"]


def test_each_language_can_have_its_own_minimum() -> None:
    rows = [{"caption": caption} for caption in [UNLIKELY[0], *OTHER.values()]]
    spared = {"de": None}
    for minima, first in [({"en": 0.1, "de": 0.6}, None), ({"en": 0.15, "de": 0.6}, "language")]:
        rest = [spared.get(code, "language") for code in OTHER]
        check_filter(Language(keep=["en", "de"], min_score=minima), rows, [first, *rest])
    # Neither reaches its own minimum, though together they reach both.
    check_filter(Language(keep=["es", "en"], min_score={"es": 0.2, "en": 0.2}), rows[:1], ["low_score"])
    step = Language(keep=["en", "de"], min_score={"en": 0.15, "de": 0.6})
    _, drops = run_step(step, make_batch(rows[:1]))
    assert drops["detail"].to_pylist()[0].startswith("es 0.1558, en 0.1434, de 0.")


def test_invalid_utf8_does_not_fail_the_batch() -> None:
    batch = make_batch([{}, {}])
    raw = pa.array([b"a brown dog runs across a field of gr\xff\xed\xa0\x80ss", b"\xff\xfe"], pa.binary())
    invalid = pa.StringArray.from_buffers(len(raw), *raw.buffers()[1:])
    batch = batch.set_column(batch.column_names.index("caption"), "caption", invalid)
    step = Language()
    step.setup()
    assert step.process(batch)["drop_reason"].to_pylist() == [None, "low_score"]


def test_a_measurement_does_not_depend_on_the_batch() -> None:
    alone, _ = run_step(Language(keep=None), make_batch([{"caption": ENGLISH[0]}]))
    among, _ = run_step(Language(keep=None), make_batch([{"caption": c} for c in [*OTHER.values(), ENGLISH[0]]]))
    assert alone["language_score"].to_pylist()[0] == among["language_score"].to_pylist()[-1]


@pytest.mark.parametrize(
    ("options", "key", "hint"),
    [
        ({"keep": [False]}, "keep", "'no'"),
        ({"keep": ["english"]}, "keep", "did you mean 'en'"),
        ({"keep": ["EN"]}, "keep", "did you mean 'en'"),
        ({"keep": ["xx"]}, "keep", "ISO 639"),
        ({"keep": []}, "keep", "null"),
        ({"min_score": 30.0}, "min_score", "above 0 and at most 1"),
        ({"min_score": 0.0}, "min_score", "above 0"),
        ({"min_score": float("nan")}, "min_score", "above 0 and at most 1"),
        ({"min_score": {"en": 2.0}}, "min_score", "found 2.0 for en"),
        ({"min_score": {"en": 0.5, "de": 0.5}}, "min_score", "each language of `keep` (en), found en, de"),
        ({"keep": None, "min_score": {"en": 0.5}}, "min_score", "each language of `keep` (none)"),
        ({"model": "no/such.bin"}, "model", "no such file"),
    ],
)
def test_invalid_options_are_reported(options: dict, key: str, hint: str) -> None:
    [(found, problem)] = Language(**options).check()
    assert found == key
    assert hint in problem


def test_an_invalid_model_file_is_reported(tmp_path: Path) -> None:
    path = tmp_path / "lid.bin"
    path.write_bytes(b"not a model")
    assert [key for key, _ in Language(model=str(path)).check()] == ["model"]
