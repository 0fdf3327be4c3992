from __future__ import annotations

import math
from pathlib import Path

import pytest

from trainer.yamlfile import MAX_CHARS, Document


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        *[(word, word) for word in ("no", "on", "yes", "off", "y", "n", "No", "ON", "tRuE", "inf", "nan", "e5")],
        *[(word, word) for word in ("truelove", "falsehood", "true-colors", "TRUE_COLOURS", "nullify", "~/data")],
        *[(word, word) for word in ("12:30", "1:2:3", "2026-01-31", "2026-01-31T10:00:00Z", "1.2.3", "0x", "=", "1e")],
        *[(word, True) for word in ("true", "True", "TRUE")],
        *[(word, False) for word in ("false", "False", "FALSE")],
        *[(word, None) for word in ("", "~", "null", "Null", "NULL")],
        *[("7", 7), ("-7", -7), ("+7", 7), ("0123", 123), ("10_000", 10000), ("0x1F", 31), ("0o17", 15)],
        *[("1e-3", 1e-3), ("5e-1", 0.5), ("1E3", 1000.0), ("1.", 1.0), (".5", 0.5), ("-1.5e+2", -150.0)],
        *[(".inf", math.inf), ("-.inf", -math.inf), ("1_000.5", 1000.5)],
        *[("'no'", "no"), ("'1'", "1"), ("!!str 1", "1"), ("!!float 1", 1.0)],
        ("{no: on, 1: 2}", {"no": "on", "1": 2}),
        ("\ufeffa: 1", {"a": 1}),
        ("a: &x {k: 1}\nb: {<<: *x, m: 2}\nc: {<<: [*x, {z: 3}], k: 4}", {
            "a": {"k": 1}, "b": {"k": 1, "m": 2}, "c": {"k": 4, "z": 3}
        }),
        ("a: &x [1, 2]\nb: *x", {"a": [1, 2], "b": [1, 2]}),
    ],
)  # fmt: skip
def test_values_have_the_types_they_look_like(tmp_path: Path, text: str, expected: object) -> None:
    (tmp_path / "f.yaml").write_text(text, encoding="utf-8")
    document = Document.read(tmp_path / "f.yaml")
    assert (document.data, document.problems) == (expected, [])
    assert type(document.data) is type(expected)


def test_nan_is_a_number() -> None:
    assert math.isnan(Document(".nan").data)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: 1\nb: 2\na: 3\nb: 4", "f.yaml:3: a: duplicate key (first on line 1)\n"
                                  "f.yaml:4: b: duplicate key (first on line 2)"),
        ("a:\n  - {b: 1, b: 2}", "f.yaml:2: a.0.b: duplicate key (first on line 2)"),
        ("a: [", "f.yaml:1: not valid YAML: expected the node content, but found '<stream end>'"),
        ("a: 1\n b: 2", "f.yaml:2: not valid YAML: mapping values are not allowed here"),
        ("a: b: c", "f.yaml:1: not valid YAML: mapping values are not allowed here"),
        ("a: 1\n\tb: 2", "f.yaml:2: not valid YAML"),
        ("a: 1\nb: \x07", "f.yaml:2: not valid YAML: the character U+0007 is not allowed"),
        ("a: *x", "f.yaml:1: not valid YAML: found undefined alias 'x'"),
        ("a: 1\n---\nb: 2", "f.yaml:2: not valid YAML: but found another document"),
        ("{{name}}: 1", "f.yaml:1: a list or a mapping cannot be a key"),
        ("a: !!python/object/apply:os.system [id]", "is not read"),
        ("a: !!timestamp 2026-01-31", "is not read"),
        ("a: !!int x", "f.yaml:1: 'x' is not a number"),
        ("a: {<<: 3}", "f.yaml:1: <<: expected a mapping"),
        ("9" * 5000, "is not a number"),
        # Documents made to take all time and memory.
        ("[" * 100_000, "nested more than 50 levels deep"),
        ("{a: " * 60, "f.yaml"),
        ("- " * 60 + "x", "f.yaml:1: nested more than 50 levels deep"),
        ("? " * 10_000, "nested more than 50 levels deep"),
        ("&a [*a]", "nested more than 50 levels deep"),
        ("a: &a {<<: *a}", "nested more than 50 levels deep"),
        ("a0: &a0 [x]\n" + "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]\n" for i in range(1, 10)),
         "more than 100,000 values"),
        ("[" + "1," * 150_000 + "]", "more than 100,000 values"),
        ("a" * (MAX_CHARS + 1), "more than 1,048,576 characters"),
    ],
)  # fmt: skip
def test_errors_give_their_line(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "f.yaml"
    path.write_text(text, encoding="utf-8")
    problems = "\n".join(Document.read(path).problems)
    assert message in problems.replace(f"{tmp_path}/", "")


def test_a_file_that_is_not_text_is_refused(tmp_path: Path) -> None:
    (tmp_path / "latin.yaml").write_bytes("name: Café".encode("latin-1"))
    assert Document.read(tmp_path / "latin.yaml").problems == [f"{tmp_path}/latin.yaml: not a text file in UTF-8"]
    assert Document.read(tmp_path / "none.yaml").problems == [f"{tmp_path}/none.yaml: No such file or directory"]
    assert Document.read(tmp_path).problems == [f"{tmp_path}: Is a directory"]


def test_keys_map_to_their_lines() -> None:
    document = Document("a: 1\nb:\n  - x\n  - y: 2\n", "f.yaml")
    assert document.where("b", 1, "y") == "f.yaml:4"
    assert document.where("b", 1, "z") == "f.yaml:4"
    assert document.where("c") == "f.yaml"


def test_a_document_without_a_file_name() -> None:
    assert Document("[").problems[0].startswith("not valid YAML")
    assert Document("true-colors").data == "true-colors"
