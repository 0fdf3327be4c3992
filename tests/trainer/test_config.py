from __future__ import annotations

import contextlib
import dataclasses
from pathlib import Path

import pytest

from trainer.config import ConfigError, TrainConfig, load_config

GOOD = "shards: a\noutput: b\nmodel: tiny-64\nlr: 1e-3\n"


def read(tmp_path: Path, text: str, *overrides: str):  # type: ignore[no-untyped-def]
    (tmp_path / "c.yaml").write_text(text)
    return load_config(tmp_path / "c.yaml", overrides)


def test_values_defaults_and_overrides(tmp_path: Path) -> None:
    config = read(tmp_path, GOOD, "batch_size=64", "lr=5e-4", "precision=fp32", "beta2=null")
    assert (config.lr, config.batch_size, config.epochs, config.precision, config.beta2) == (5e-4, 64, 32, "fp32", None)


def test_yaml_numbers_are_numbers_and_no_is_text(tmp_path: Path) -> None:
    assert read(tmp_path, GOOD).lr == 0.001
    assert read(tmp_path, GOOD.replace("tiny-64", "no")).model == "no"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (GOOD + "lr: 2", "c.yaml:5: lr: duplicate key (first on line 4)"),
        (GOOD + "bacth_size: 3", "bacth_size: no such key; did you mean batch_size?"),
        (GOOD + "export: no", "export: found 'no', expected true or false"),
        (GOOD + "epochs: 1.5", "epochs: found 1.5, expected a whole number"),
        (GOOD + "epochs: .inf", "epochs: found inf, expected a whole number"),
        (GOOD + "seed: .nan", "seed: found nan, expected a whole number"),
        (GOOD + "seed: 9223372036854775808", "seed: found 9223372036854775808, expected at most"),
        (GOOD + "workers: 100000", "workers: found 100000, expected at most 1,024"),
        (GOOD + "weight_decay: .nan", "weight_decay: found nan, expected a number from 0"),
        (GOOD + "weight_decay: .inf", "weight_decay: found inf, expected a number from 0"),
        (GOOD.replace("1e-3", "1" + "0" * 400), "lr: found 1000"),
        (GOOD.replace("output: b", "output: 1e3"), "output: found 1000.0, expected text; put it in quotes"),
        (GOOD.replace("output: b", "output: ''"), "output: found '', expected a local folder"),
        (GOOD.replace("output: b", "output: s3://b/a"), "output: found 's3://b/a', expected a local folder"),
        (GOOD.replace("output: b", 'output: "a\\0b"'), "output: found 'a\\x00b', expected a local folder"),
        (GOOD + "epochs: true", "epochs: found True, expected a whole number"),
        (GOOD + "warmup: -1", "warmup: found -1"),
        (GOOD + "threads: 0", "threads: found 0, expected at least 1"),
        (GOOD + "micro_batch_size: 0", "micro_batch_size: found 0, expected at least 1"),
        (GOOD + "batch_size: 9\nranks: 2", "batch_size: found 9, expected a multiple of ranks (2)"),
        (GOOD + "loss: sigmoid", "loss: found 'sigmoid', expected clip or siglip"),
        (GOOD + "lock_image: true", "set pretrained"),
        (GOOD + "lock_image: true\nlock_text: true\npretrained: w", "nothing is left to train"),
        (GOOD.replace("shards: a", "shards: 3"), "shards: found 3"),
        (GOOD + "precision: fp8", "precision: found 'fp8', expected auto, fp32, bf16 or fp16"),
        ("shards: a", "model: missing"),
        ("- a", "expected lines of `key: value`"),
        ("a: [", "c.yaml"),
    ],
)
def test_mistakes_are_named(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ConfigError) as error:
        read(tmp_path, text)
    assert message in str(error.value)


ODD = [
    *("", "''", "~", ".nan", ".inf", "-.inf", "1e400", "-1", "0", "1.5", "1e18", "0x10", "1" + "0" * 400, "true", "on"),
    *("[]", "[1]", "[[a]]", "{a: b}", "{}", '"a\\0b"', '"\\uD800"', "2026-01-31", "12:30", "!!int x", "- a"),
]


@pytest.mark.parametrize("key", [field.name for field in dataclasses.fields(TrainConfig)])
def test_any_value_of_any_key_is_taken_or_named(tmp_path: Path, key: str) -> None:
    for value in ODD:
        with contextlib.suppress(ConfigError):
            read(tmp_path, GOOD, f"{key}={value}")


def test_all_mistakes_at_once(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as error:
        read(tmp_path, "lrr: 1\nepochs: many\nshards: a\noutput: b\n", "nonsense")
    assert len(str(error.value).splitlines()) == 5


def test_the_shipped_configurations_are_valid() -> None:
    conf = Path(__file__).parents[2] / "conf"
    for path in [*conf.glob("train_*.yaml"), conf / "filter_network.yaml"]:
        load_config(path)


@pytest.mark.parametrize("value", ["falsehood", "trueblue", "TRUE_COLOURS", "true-colors", "no", "12:30", "2026-01-31"])
def test_an_override_that_looks_like_text_is_text(tmp_path: Path, value: str) -> None:
    assert read(tmp_path, GOOD, f"output={value}").output == value


def test_a_hostile_override_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"nested more than 50 levels deep"):
        read(tmp_path, GOOD, "output=" + "[" * 10_000)
