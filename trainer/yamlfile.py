"""Reads YAML files and the values of `key=value` overrides, for pipeline and trainer.

Scalars follow YAML 1.2's core schema, not YAML 1.1: `no`, `on`, `12:30` and `2026-01-31` are text, `1e-3` is a number,
and `0123` is 123. Digits may be grouped as in `10_000`. A key is always text, and a duplicate key is an error. Anchors,
aliases and merge keys (`<<`) work. A document that is nested too deeply or too large with its aliases expanded is an
error.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

MAX_CHARS = 1 << 20
MAX_DEPTH = 50
MAX_VALUES = 100_000
"""Limit for a document with its aliases expanded."""

_TAG = "tag:yaml.org,2002:"
_SCALARS: dict[str, tuple[str, str, Callable[[str], Any]]] = {
    # By type: the pattern, the possible first characters, and the function from the text to the value.
    "null": (r"~|null|Null|NULL|", "~nN", lambda text: None),
    "bool": (r"true|True|TRUE|false|False|FALSE", "tTfF", lambda text: text.lower() == "true"),
    "int": (
        r"[-+]?[0-9][0-9_]*|0o[0-7]+|0x[0-9a-fA-F]+",
        "-+0123456789",
        lambda text: int(text.replace("_", ""), 0 if text[:2] in ("0o", "0x") else 10),
    ),
    "float": (
        r"[-+]?(?:(?:[0-9][0-9_]*)?\.[0-9]+|[0-9][0-9_]*\.?)(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)",
        "-+.0123456789",
        lambda text: float(re.sub(r"\.(?=[a-zA-Z])", "", text.replace("_", ""))),
    ),
    "str": (r"(?!)", "", lambda text: text),
}


class _UnreadableError(Exception):
    """(line, problem)"""


class _Loader(yaml.SafeLoader):
    yaml_implicit_resolvers: dict[str, Any] = {}  # noqa: RUF012

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self._nodes = 0

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        self._nodes += 1
        if self._nodes > MAX_VALUES:
            raise _UnreadableError(None, f"more than {MAX_VALUES:,} values")
        return super().compose_node(parent, index)


for _name, (_pattern, _first, _) in _SCALARS.items():
    # The empty scalar is looked up under the empty string.
    _firsts = [*_first, ""] if _name == "null" else [*_first]
    _Loader.add_implicit_resolver(_TAG + _name, re.compile(f"(?:{_pattern})$"), _firsts)


class Document:
    """The plain data of a YAML document, with the line of each key and item.

    `problems` has a line per problem: `FILE:LINE: KEY: problem`, without `FILE:LINE` if `path` is empty. `data` is None
    if the document cannot be read; a duplicate key has its first value.
    """

    def __init__(self, text: str, path: str = "") -> None:
        self.path = path
        self.data: Any = None
        self.problems: list[str] = []
        self._lines: dict[tuple[Any, ...], int] = {}
        self._values = 0
        if len(text) > MAX_CHARS:
            self._note(None, f"more than {MAX_CHARS:,} characters")
            return
        try:
            node = _Loader(text).get_single_node()
            data = self._plain(node, ()) if node else None
        except _UnreadableError as error:
            self._note(*error.args)
        except RecursionError:
            self._note(None, f"nested more than {MAX_DEPTH} levels deep")
        except yaml.reader.ReaderError as error:
            line = text.count("\n", 0, error.position) + 1
            self._note(line, f"not valid YAML: the character U+{error.character:04X} is not allowed")
        except yaml.MarkedYAMLError as error:
            mark = error.problem_mark or error.context_mark
            self._note(mark.line + 1 if mark else None, f"not valid YAML: {error.problem or error.context}")
        else:
            self.data = data

    @classmethod
    def read(cls, path: str | Path) -> Document:
        """Reads the document in a file; a file that cannot be read gives a document with a problem."""
        try:
            with Path(path).open(encoding="utf-8-sig") as file:
                return cls(file.read(MAX_CHARS + 1), str(path))
        except (OSError, UnicodeDecodeError) as error:
            broken = cls("", str(path))
            broken._note(None, (error.strerror if isinstance(error, OSError) else None) or "not a text file in UTF-8")
            return broken

    def where(self, *key: Any) -> str:
        """`FILE:LINE` of a key, or of its nearest parent that has a line; just `FILE` if there is none."""
        while key and key not in self._lines:
            key = key[:-1]
        return f"{self.path}:{self._lines[key]}" if key else self.path

    def _note(self, line: int | None, problem: str) -> None:
        where = f"{self.path}:{line}" if line else self.path
        self.problems.append(f"{where}: {problem}" if self.path else problem)

    def _plain(self, node: yaml.Node, key: tuple[Any, ...]) -> Any:
        line = node.start_mark.line + 1
        self._values += 1
        if self._values > MAX_VALUES:
            raise _UnreadableError(line, f"more than {MAX_VALUES:,} values, aliases expanded")
        if len(key) > MAX_DEPTH:
            raise _UnreadableError(line, f"nested more than {MAX_DEPTH} levels deep")
        if isinstance(node, yaml.ScalarNode):
            return _scalar(node)
        if node.tag != _TAG + ("seq" if isinstance(node, yaml.SequenceNode) else "map"):
            raise _UnreadableError(line, f"the tag {node.tag!r} is not read")
        if isinstance(node, yaml.SequenceNode):
            for i, item in enumerate(node.value):
                self._lines[key + (i,)] = item.start_mark.line + 1
            return [self._plain(item, (*key, i)) for i, item in enumerate(node.value)]
        result: dict[str, Any] = {}
        merged: list[Any] = []
        for name_node, value in node.value:
            line = name_node.start_mark.line + 1
            if not isinstance(name_node, yaml.ScalarNode):
                raise _UnreadableError(
                    line, "a list or a mapping cannot be a key; text that begins with { needs quotes"
                )
            name = str(name_node.value)
            if name == "<<" and name_node.style is None:
                found = self._plain(value, (*key, name))
                merged += found if isinstance(found, list) else [found]
                continue
            if name in result:
                first = self._lines[key + (name,)]
                self._note(line, f"{'.'.join(map(str, (*key, name)))}: duplicate key (first on line {first})")
                continue
            self._lines[key + (name,)] = line
            result[name] = self._plain(value, (*key, name))
        for other in merged:
            if not isinstance(other, dict):
                raise _UnreadableError(node.start_mark.line + 1, "<<: expected a mapping, or a list of mappings")
            result = {**other, **result}
        return result


def _scalar(node: yaml.ScalarNode) -> Any:
    kind = node.tag.removeprefix(_TAG)
    line = node.start_mark.line + 1
    if kind not in _SCALARS:
        raise _UnreadableError(line, f"the tag {node.tag!r} is not read")
    try:
        return _SCALARS[kind][2](node.value)
    except ValueError:  # an explicit tag, such as `!!int x`, or more digits than Python converts
        raise _UnreadableError(line, f"{node.value[:40]!r} is not a number") from None
