from __future__ import annotations

import contextlib
import dataclasses
import json
import os
from pathlib import Path

import numpy as np
import pytest

from pipeline import pool, recipe
from pipeline.recipe import RecipeError

GOOD = """
name: test
seed: 3
pool: {path: pool.csv, url: url, caption: caption}
run: out
steps:
  - caption_length: {min_chars: 6}
  - exact_dedup: {by: [url]}
  - exact_dedup: {by: [url, caption]}
  - sample: {fraction: 1e-1}
"""


@pytest.fixture(autouse=True)
def pool_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("pool.csv").write_text("url,caption\nhttp://a/b,hello there world\n")


def load(text: str, *overrides: str) -> recipe.Recipe:
    Path("r.yaml").write_text(text)
    return recipe.load("r.yaml", list(overrides), pool.columns)


def problems(text: str, *overrides: str) -> str:
    with pytest.raises(RecipeError) as caught:
        load(text, *overrides)
    return "\n".join(caught.value.problems)


def test_a_good_recipe_with_overrides() -> None:
    checked = load(
        GOOD, "steps.caption_length.min_words=2", "steps.exact_dedup.2.by=[caption]", "run=elsewhere", "workers=1"
    )
    assert [s.label for s in checked.steps] == ["caption_length", "exact_dedup", "exact_dedup.2", "sample"]
    assert checked.steps[0].min_words == 2  # type: ignore[attr-defined]
    assert checked.steps[2].by == ["caption"]  # type: ignore[attr-defined]
    assert checked.steps[3].fraction == 0.1, "1e-1 is a number, not text"  # type: ignore[attr-defined]
    assert checked.steps[3].seed == 3, "a step takes the recipe's seed"  # type: ignore[attr-defined]
    assert (checked.run, checked.workers) == ("elsewhere", 1)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (
            "min_chars: 6",
            "min_char: 6",
            "r.yaml:7: steps.caption_length.min_char: unknown key; did you mean min_chars?",
        ),
        (
            "min_chars: 6",
            "min_chars: six",
            "r.yaml:7: steps.caption_length.min_chars: expected a whole number, found 'six'",
        ),
        ("min_chars: 6", "min_chars: true", "expected a whole number, found True"),
        ("min_chars: 6", "min_chars: 6.5", "expected a whole number, found 6.5"),
        (
            "min_chars: 6",
            "min_chars: 6, min_chars: 7",
            "steps.0.caption_length.min_chars: duplicate key (first on line 7)",
        ),
        (
            "caption_length:",
            "caption_lenght:",
            "r.yaml:7: steps.caption_lenght: unknown step; did you mean caption_length?",
        ),
        ("seed: 3", "sed: 3", "r.yaml:3: sed: unknown key; did you mean seed?"),
        ("seed: 3", "seed: 3\nworkers: 0", "workers: expected 1 to 100,000, found 0"),
        ("name: test", "", "name: is missing"),
        ("path: pool.csv", "path: pol.csv", "pool: path: pol.csv does not exist"),
        ("caption: caption}", "caption: text}", "pool.csv has no column 'text'; it has url, caption"),
        ("url: url", "url: 7", "r.yaml:4: pool.url: expected text, found 7"),
        (
            "[url, caption]",
            "[phash]",
            "needs the column 'phash'; no step above it adds that column; download or read_shards adds it",
        ),
        (
            "- sample: {fraction: 1e-1}",
            "- write_shards\n  - sample: {fraction: 0.5}",
            "write_shards: must be the last step",
        ),
        (
            "- sample: {fraction: 1e-1}",
            "- nowhere.my_step",
            "nowhere.my_step: no such module; is its folder on PYTHONPATH?",
        ),
        ("- sample: {fraction: 1e-1}", "- {sample: {}, language: {}}", "steps[3]: expected one step"),
        ("  - sample: {fraction: 1e-1}", " - [", "not valid YAML"),
        ("seed: 3", "seed: " + "[" * 100_000, "nested more than 50 levels deep"),
        ("seed: 3", "a: &a [*a]", "nested more than 50 levels deep"),
    ],
)
def test_problems_name_file_line_key_and_cure(old: str, new: str, message: str) -> None:
    assert old in GOOD
    assert message in problems(GOOD.replace(old, new))


def test_all_problems_are_reported_together() -> None:
    text = (
        GOOD.replace("min_chars: 6", "min_char: 6")
        .replace("seed: 3", "sed: 3")
        .replace("path: pool.csv", "path: x.csv")
    )
    assert problems(text).count("r.yaml:") == 3


def test_the_language_code_no_is_not_read_as_false() -> None:
    checked = load(GOOD.replace("- sample: {fraction: 1e-1}", "- language: {keep: [no, de]}"))
    assert checked.steps[-1].keep == ["no", "de"]  # type: ignore[attr-defined]


def test_steps_in_an_impossible_order() -> None:
    text = GOOD.replace("  - sample: {fraction: 1e-1}", "  - near_dedup\n  - download")
    assert "steps.near_dedup: needs the column 'phash'; put it below download, which adds it" in problems(text)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("steps.nearest.x=1", "the recipe has no step 'nearest'"),
        ("steps.caption_length=3", "expected an option of the step, as in steps.caption_length.OPTION=3"),
        ("steps.caption_lenght.min_chars=1", "did you mean caption_length?"),
        ("min_chars", "an override is key=value"),
        ("run=[", "'run=[': the value: not valid YAML"),
        ("run=" + "[" * 10_000, "nested more than 50 levels deep"),
        ("steps.caption_length.min_chars=few", "expected a whole number, found 'few'"),
    ],
)
def test_wrong_overrides(override: str, message: str) -> None:
    assert message in problems(GOOD, override)


def test_a_missing_file_or_invalid_yaml() -> None:
    with pytest.raises(RecipeError, match="No such file"):
        recipe.load("missing.yaml")
    assert "expected a mapping" in problems("- just\n- a list\n")
    Path("binary.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(RecipeError, match="UTF-8"):
        recipe.load("binary.yaml")


def test_speed_options_do_not_change_the_identity_of_a_step() -> None:
    first, second = load(GOOD), load(GOOD, "workers=7")
    assert [recipe.identity(s) for s in first.steps] == [recipe.identity(s) for s in second.steps]
    third = load(GOOD, "steps.caption_length.min_chars=7")
    assert recipe.identity(first.steps[0]) != recipe.identity(third.steps[0])


SCORED = """
name: test
pool: {path: pool.csv}
run: out
steps:
  - download
  - clip_score: {embeddings: true}
"""


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (
            "near_dedup: {column: image_embedding}",
            "r.yaml:8: steps.near_dedup.column: the column 'image_embedding' holds",
        ),
        (
            "semantic_dedup: {vector: clip_score}",
            "r.yaml:8: steps.semantic_dedup.vector: the column 'clip_score' holds float, expected vectors",
        ),
    ],
)
def test_whole_run_filters_reject_columns_of_the_wrong_kind(line: str, message: str) -> None:
    assert message in problems(f"{SCORED}  - {line}\n")


def test_vectors_reach_a_filter_over_vectors() -> None:
    checked = load(f"{SCORED}  - semantic_dedup: {{keep_highest: clip_score}}\n")
    assert checked.steps[-1].needs == ("image_embedding", "clip_score")


SAID_OF_JOBS = "lies in the job's temporary copy of its working directory"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["run=''"], "run: is empty; expected a folder"),
        (["run=pool.csv"], "pool.csv is a file; expected a folder"),
        (["run=pool.csv/run"], "pool.csv is a file; expected a folder"),
        (["run=."], ""),
        (["run=data", "pool.path=data"], "run: must not share a folder with the pool"),
        (["run=data/out", "pool.path=data"], "run: must not share a folder with the pool"),
        (["run=.", "pool.path=data/*.csv"], "run: must not share a folder with the pool"),
        (["run=data", "pool.path=data/*.csv"], "run: must not share a folder with the pool"),
        (["run=data/out", "pool.path=data/**/*.csv"], "run: must not share a folder with the pool"),
        (["run=data/out", "pool.path=data/*.csv"], ""),
        (["run=data", "pool.path=data/pool.csv"], ""),
        (["reuse=dmeo"], "reuse: dmeo is not the folder of a run: missing "),
        (["reuse=''"], "reuse: is empty"),
        (["reuse=out"], "reuse: is the run itself"),
        (["name=''"], "name: expected a line of 1 to 200 printable characters"),
        (['name="a\\nb"'], "name: expected a line of 1 to 200 printable characters"),
        (["unit_rows=0"], "unit_rows: expected 1 to 1,000,000, found 0"),
        (["unit_rows=-1"], "unit_rows: expected 1 to 1,000,000, found -1"),
        (["unit_rows=1000000000000"], "unit_rows: expected 1 to 1,000,000, found 1,000,000,000,000"),
        (["unit_rows=1e12"], "unit_rows: expected a whole number"),
        (["workers=1000000000"], "workers: expected 1 to 100,000"),
        (["seed=99999999999999999999999"], "seed: expected a finite number that fits in 63 bits"),
        (["pool.rows=-5"], "pool: rows: must be 0 or more, found -5"),
        (
            ["steps.sample.fraction=.nan"],
            "r.yaml:10: steps.sample.fraction: expected a finite number that fits",
        ),
        (["steps.sample.fraction=.inf"], "found inf"),
        ([f"run={'x' * 256}"], "run: expected names of at most 255 bytes in the path, found 'xxx"),
        (["run=nonsense://bucket/x"], "run: nonsense://bucket/x cannot be used: Protocol not known: nonsense"),
        (["run=memory:///"], "run: memory:/// names no bucket or folder"),
    ],
)
def test_unusable_values_are_refused(words: list[str], message: str) -> None:
    Path("data").mkdir()
    Path("data/pool.csv").write_text("url,caption\nhttp://a/b,hello there world\n")
    if message:
        assert message in problems(GOOD, *words)
    else:
        load(GOOD, *words)


def test_an_unwritable_run_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.access", lambda path, mode: False)  # root may write anywhere
    assert "is not writable" in problems(GOOD)


def test_paths_in_a_job_s_temporary_working_directory_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = tmp_path / "session_1/runtime_resources/working_dir_files/_ray_pkg_0"
    job.mkdir(parents=True)
    (job / "pool.csv").write_text("url,caption\nhttp://a/b,hello there world\n")
    monkeypatch.chdir(job)
    found = problems(GOOD, "reuse=before")
    assert f"r.yaml:5: run: out {SAID_OF_JOBS}" in found
    assert f"r.yaml:4: pool.path: pool.csv {SAID_OF_JOBS}" in found
    assert f"reuse: before {SAID_OF_JOBS}" in found
    load(GOOD, f"run={tmp_path}/out", f"pool.path={tmp_path}/pool.csv")


REQUIRED = {
    "caption_entries": {"entries": "words.txt"},
    "image_cluster": {"target": "v.npy"},
    "match_entries": {"entries": "words.txt"},
    "norm_sim": {"target": "v.npy"},
    "takedown": {"file": "words.txt"},
    "text_safety": {"words": "words.txt"},
    "threshold": {"column": "score", "min": 0.5},
}
ODD = [
    "''", "' '", "['']", "{a: ''}", "null", "[null]", "{a: null}", "[[1]]", "{}", "true", "-1", "1e400", ".nan", ".inf",
    "9223372036854775808", "1e-320", "'1'", "abc", "'('", "['(']", '"\\e[31m"', '"a\\0b"', "s3://", "/dev/zero",
    "[/dev/zero]", "{a: pipe}", "pipe", "file:///dev/zero", "/nowhere/x", ".", "v.npy", "words.txt",
]  # fmt: skip


@pytest.mark.parametrize("name", recipe.built_in_steps())
def test_an_odd_value_of_any_option_is_refused_or_makes_a_step(name: str) -> None:
    """No input hangs, exhausts the memory, or raises an error other than RecipeError."""
    Path("words.txt").write_text("a red car\n")
    np.save("v.npy", np.ones((5, 8), np.float32))
    os.mkfifo("pipe")
    cls = recipe.find_step(name)
    for f in dataclasses.fields(cls):
        for value in ODD:
            options = {key: f"{key}: {json.dumps(given)}" for key, given in REQUIRED.get(name, {}).items()}
            options[f.name] = f"{f.name}: {value}"
            text = (
                f"name: t\npool: {{path: pool.csv}}\nrun: out\nsteps:\n  - {name}: {{{', '.join(options.values())}}}\n"
            )
            Path("r.yaml").write_text(text)
            with contextlib.suppress(RecipeError):
                recipe.load("r.yaml", pool_columns=lambda spec: None)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("download: {deny_hashes: ''}", "download.deny_hashes: expected text that is not blank, found ''"),
        ("caption_pattern: {patterns: ['', x]}", "patterns: expected text that is not blank, found ['', 'x']"),
        ("download: {deny_hashes: /dev/zero}", "deny_hashes: /dev/zero is a device, pipe or socket; expected a file"),
        ("text_safety: {words: file:///dev/zero}", "words: file:///dev/zero is a device, pipe or socket"),
        ("download: {decode_processes: 1000000}", "download.decode_processes: 1000000 must be 1 to 1,000"),
        ("download: {decode_timeout: 1e-320}", "download.decode_timeout: 1e-320 must be 0.01 to 86,400"),
        ("download: {decode_memory: 9000000000000000000}", "download.decode_memory: 9000000000000000000 must be 1 to"),
        ("download: {encode_format: webp, image_size: 20000}", "20000 must be at most 16,383, the widest webp"),
        ("clip_score: {batch_size: 9000000000000000000}", "batch_size: 9000000000000000000 must be 1 to 65,536"),
        ('norm_sim: {target: v.npy, column: "a b"}', "norm_sim.column: 'a b' is not a valid column name"),
    ],
)
def test_impossible_values_are_refused(line: str, message: str) -> None:
    np.save("v.npy", np.ones((5, 8), np.float32))
    assert message in problems(f"name: t\npool: {{path: pool.csv}}\nrun: out\nsteps:\n  - {line}\n")
