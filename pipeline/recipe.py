"""From YAML to checked steps: whatever can be wrong with a recipe is said here, all at once, before anything starts."""

from __future__ import annotations

import dataclasses
import difflib
import importlib
import importlib.util
import json
import pkgutil
import re
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa
import pydantic
import yaml

from pipeline.schema import INLINE, POSITION, SAMPLE, carried
from pipeline.step import Step

PACKAGES = ("pipeline.stages", "pipeline.filters")


class RecipeError(Exception):
    """Everything that is wrong with a recipe, a line each."""

    def __init__(self, problems: list[str]) -> None:
        super().__init__("\n".join(problems))
        self.problems = problems


@dataclass(kw_only=True)
class PoolSpec:
    """Where the candidates come from."""

    path: str | list[str] = ""
    """A file, a glob, a folder, or a list of these: parquet, csv, tsv, jsonl or json, also `.gz`, `.zst` and `.bz2`."""
    retry: str | None = None
    """Instead of all else: a finished run, whose rows that the web failed for the moment are the pool."""
    url: str = "url"
    """The column that holds the URL."""
    caption: str = "caption"
    """The column that holds the caption."""
    uid: str | None = None
    """The column that holds the pool's own uids (32 hex digits); none: they are computed from url and caption."""
    image: str | None = None
    """The column that holds the pictures themselves, encoded: bytes, or Hugging Face's struct of bytes and path."""
    columns: list[str] | None = None
    """Further columns to carry along; none named: all."""
    types: dict[str, Literal["text", "int", "float"]] | None = None
    """Types of further columns, where the first rows of a text file would mislead."""
    names: list[str] | None = None
    """The names of the columns of csv and tsv files that have no line of names."""
    quoted: bool | None = None
    """Whether quotation marks enclose fields (RFC 4180) or are data like any other; none: they enclose in csv only."""
    captions: Literal["each", "first"] | None = None
    """Of a column of lists of captions: a row for each, or the first."""
    rows: int | None = None
    """How many rows to expect; only `--plan` reads it, for a pool that cannot be counted from here."""

    def __post_init__(self) -> None:
        if self.retry is None:
            if not self.path:
                raise ValueError("path: is missing")
            self._check()
            return
        own = (f for f in dataclasses.fields(self) if f.name not in ("retry", "rows"))
        given = [f.name for f in own if getattr(self, f.name) != f.default]
        if given:
            raise ValueError(f"retry: leaves no room for {', '.join(given)}: the rows are those of {self.retry}/drops")
        # What a ledger of drops holds.
        self.path, self.uid, self.columns = f"{self.retry.rstrip('/')}/drops/*.parquet", "uid", []

    def _check(self) -> None:
        for key in ("names", "columns"):
            names = getattr(self, key) or []
            if twins := sorted({name for name in names if names.count(name) > 1}):
                raise ValueError(f"{key}: {', '.join(twins)}: named more than once")
        if self.names is not None:
            for key in ("url", "caption", "uid"):
                if (column := getattr(self, key)) is not None and column not in self.names:
                    raise ValueError(f"names: {column!r}, the {key}, is not among {', '.join(self.names) or 'none'}")
        if self.captions == "each" and self.uid is not None:
            raise ValueError("captions: each makes several rows of one uid; leave out uid, or take the first")
        mapped = (self.url, self.caption, self.uid, self.image)
        for key in ("columns", "types"):
            if twins := [name for name in getattr(self, key) or () if name in mapped]:
                raise ValueError(f"{key}: {', '.join(twins)} is there already, as url, caption, uid or image")


PoolColumns = Callable[[PoolSpec], Mapping[str, pa.DataType] | None]


@dataclass(kw_only=True)
class Recipe:
    """A checked recipe. `source` is the plain data it was made from, defaults not filled in."""

    name: str
    pool: PoolSpec
    run: str
    steps: list[Step] = field(default_factory=list)
    seed: int = 0
    unit_rows: int = 10_000
    """Candidates in a unit, about: the atom of scheduling, retry, commit and resume."""
    workers: int | None = None
    """Most worker processes at a time; none: as many as the cluster has cores. Never changes a result."""
    reuse: str | None = None
    """Another run whose committed passes are used where they are the same as this recipe's: a second arm of a study."""
    allow_empty: bool = False
    """Whether a run that keeps no row has done what was asked (exit status 0)."""
    source: dict[str, Any] = field(default_factory=dict)


def load(
    path: str,
    overrides: list[str] | None = None,
    pool_columns: PoolColumns | None = None,
) -> Recipe:
    """Reads and checks a recipe file.

    `overrides` are `key=value` words: `seed=1`, `pool.path=x.parquet`, `steps.download.timeout=5`; the value is YAML.
    `pool_columns` gives the further columns of the pool with their types, None where they cannot be known from here
    (ValueError if it cannot be read). Raises RecipeError.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise RecipeError([f"{path}: {error.strerror or error}"]) from None
    except UnicodeDecodeError:
        raise RecipeError([f"{path}: not a text file in UTF-8"]) from None
    problems: list[str] = []
    document = _Document(path, text, problems)
    for word in overrides or []:
        document.override(word)
    if problems:
        raise RecipeError(problems)
    recipe = _Checker(document, problems).recipe(pool_columns)
    if problems or recipe is None:
        raise RecipeError(problems)
    return recipe


def identity(step: Step) -> dict[str, Any]:
    """What determines a step's output: its class, version, options, and the contents of files they name.

    Options that only change speed are fields with `metadata={"speed": True}` and stay out.
    """
    options = {f.name: getattr(step, f.name) for f in dataclasses.fields(step) if not f.metadata.get("speed")}
    return {
        "step": f"{type(step).__module__}.{type(step).__qualname__}",
        "version": step.version,
        "options": json.loads(json.dumps(options, default=str)),
        "contents": step.fingerprint(),
    }


class _Loader(yaml.SafeLoader):
    """YAML 1.2's scalars: `no`, `on` and `yes` are words (Norwegian!), and 1e-3 is a number."""


_Loader.yaml_implicit_resolvers = {
    first: [
        (tag, regexp) for tag, regexp in resolvers if tag not in {"tag:yaml.org,2002:bool", "tag:yaml.org,2002:float"}
    ]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}

_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:bool", re.compile("^(?:true|True|TRUE|false|False|FALSE)$"), list("tTfF")
)
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(
        r"^[-+]?(?:(?:[0-9][0-9_]*\.[0-9_]*|\.[0-9]+)(?:[eE][-+]?[0-9]+)?|[0-9]+[eE][-+]?[0-9]+|\.(?:inf|nan))$"
    ),
    list("-+.0123456789"),
)


class _Document:
    """The plain data of a YAML file, with the line that each key stands on."""

    def __init__(self, path: str, text: str, problems: list[str]) -> None:
        self.path, self.problems = path, problems
        self.lines: dict[tuple[Any, ...], int] = {}
        self.data: dict[str, Any] = {}
        try:
            self._loader = _Loader(text)
            node = self._loader.get_single_node()
            data = self._plain(node, ()) if node else None
        except yaml.YAMLError as error:
            mark = getattr(error, "problem_mark", None)
            where = f"{path}:{mark.line + 1}" if mark else path
            problems.append(f"{where}: not valid YAML: {getattr(error, 'problem', None) or error}")
            return
        if isinstance(data, dict):
            self.data = data
        else:
            problems.append(f"{path}: expected a mapping with the keys name, pool, run, steps")

    def where(self, *key: Any) -> str:
        """`file:line` of a key, or of the closest thing above it."""
        while key and key not in self.lines:
            key = key[:-1]
        return f"{self.path}:{self.lines[key]}" if key else self.path

    def _plain(self, node: yaml.Node, key: tuple[Any, ...]) -> Any:
        if isinstance(node, yaml.SequenceNode):
            for i, item in enumerate(node.value):
                self.lines[key + (i,)] = item.start_mark.line + 1
            return [self._plain(item, (*key, i)) for i, item in enumerate(node.value)]
        if not isinstance(node, yaml.MappingNode):
            return self._loader.construct_object(node)
        result: dict[str, Any] = {}
        for name_node, value in node.value:
            name = str(name_node.value)
            line = name_node.start_mark.line + 1
            if name in result:
                first = self.lines[key + (name,)]
                self.problems.append(
                    f"{self.path}:{line}: {'.'.join(map(str, (*key, name)))}: there twice (also on line {first})"
                )
            self.lines[key + (name,)] = line
            result[name] = self._plain(value, (*key, name))
        return result

    def override(self, word: str) -> None:
        name, equals, text = word.partition("=")
        if not equals or not name:
            self.problems.append(f"{word!r}: an override is key=value, as in steps.download.timeout=5")
            return
        try:
            value = yaml.load(text, _Loader)  # a SafeLoader
        except yaml.YAMLError:
            self.problems.append(f"{word!r}: the value is not valid YAML")
            return
        if not name.startswith("steps."):
            target = self.data
            *parents, last = name.split(".")
            for parent in parents:
                target = target.setdefault(parent, {})
                if not isinstance(target, dict):
                    self.problems.append(f"{word!r}: {parent} is not a mapping")
                    return
            target[last] = value
            return
        label, _, option = name.removeprefix("steps.").rpartition(".")
        steps = self.data.get("steps")
        steps = steps if isinstance(steps, list) else []
        known = labels([split_line(line)[0] for line in steps])
        if label not in known:
            self.problems.append(
                f"{word!r}: the recipe has no step {label or option!r}{_nearest(label or option, known)}"
            )
            return
        i = known.index(label)
        step_name, options = split_line(steps[i])
        steps[i] = {step_name: {**(options if isinstance(options, dict) else {}), option: value}}


class _Checker:
    """Turns a document into a Recipe, noting every problem on the way."""

    def __init__(self, document: _Document, problems: list[str]) -> None:
        self.document, self.problems = document, problems

    def recipe(self, pool_columns: PoolColumns | None) -> Recipe | None:
        data = dict(self.document.data)
        step_lines, pool_data = data.pop("steps", None), data.pop("pool", None)
        top = self._options(Recipe, data, (), hidden=frozenset({"steps", "pool", "source"}))
        pool = self._pool(pool_data)
        if not isinstance(step_lines, list) or not step_lines:
            self._note(("steps",), "steps", "expected a list of steps, as in `- caption_length: {min_chars: 6}`")
            step_lines = []
        for key in ("unit_rows", "workers"):
            if isinstance(top.get(key), int) and top[key] < 1:
                self._note((key,), key, f"must be at least 1, not {top[key]}")
        steps = [
            step for i, line in enumerate(step_lines) if (step := self._step(i, line, top.get("seed", 0))) is not None
        ]
        for step, label in zip(steps, labels([s.name() for s in steps]), strict=True):
            step.__dict__["_label"] = label
        columns: Mapping[str, pa.DataType] | None = {}
        if pool is not None and pool_columns is not None:
            try:
                columns = pool_columns(pool)
            except (ValueError, OSError, ImportError) as error:
                columns = None
                self._note(("pool",), "pool", str(error))
        if len(steps) == len(step_lines):
            self._flow(steps, columns)
        if self.problems or pool is None:
            return None
        return Recipe(**top, pool=pool, steps=steps, source=self.document.data)

    def _note(self, key: tuple[Any, ...], name: str, problem: str) -> None:
        self.problems.append(f"{self.document.where(*key)}: {name}: {problem}")

    def _options(
        self, cls: type, data: dict[str, Any], key: tuple[Any, ...], hidden: frozenset[str] = frozenset()
    ) -> dict[str, Any]:  # type: ignore[assignment]
        """The given options that fit the fields of a dataclass; notes those that do not, and those that are missing."""
        prefix = ".".join(str(k) for k in key if not isinstance(k, int)) + ("." if key else "")
        fields = {f.name: f for f in dataclasses.fields(cls) if f.name not in hidden}
        hints = typing.get_type_hints(cls)
        good = {}
        for name, value in data.items():
            if name not in fields:
                known = f"; the keys are {', '.join(fields)}" if fields else "; it has no options"
                self._note((*key, name), prefix + name, f"unknown key{_nearest(name, fields) or known}")
                continue
            try:
                good[name] = pydantic.TypeAdapter(hints[name]).validate_python(value, strict=True)
            except pydantic.ValidationError:
                self._note((*key, name), prefix + name, f"expected {_type_name(hints[name])}, found {value!r}")
        for name, f in fields.items():
            if f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING and name not in data:
                self._note(key, prefix + name, "is missing")
        return good

    def _pool(self, data: Any) -> PoolSpec | None:
        if data is None:
            self._note(("pool",), "pool", "is missing; as in pool: {path: pool.parquet, url: url, caption: caption}")
            return None
        if not isinstance(data, dict):
            self._note(("pool",), "pool", f"expected a mapping such as {{path: pool.parquet}}, found {data!r}")
            return None
        before = len(self.problems)
        options = self._options(PoolSpec, data, ("pool",))
        try:
            return PoolSpec(**options) if len(self.problems) == before else None
        except ValueError as error:
            self._note(("pool",), "pool", str(error))
            return None

    def _step(self, i: int, line: Any, seed: int) -> Step | None:
        name, options = split_line(line)
        key: tuple[Any, ...] = ("steps", i)
        if name is None:
            self._note(
                key, f"steps[{i}]", f"expected one step, as in `- caption_length: {{min_chars: 6}}`, found {line!r}"
            )
            return None
        if options is not None and not isinstance(options, dict):
            self._note(key, name, f"expected a mapping of options, found {options!r}")
            return None
        try:
            cls = find_step(name)
        except ValueError as error:
            self._note(key, f"steps.{name}" if "." not in name else name, str(error))
            return None
        before = len(self.problems)
        good = self._options(cls, options or {}, ("steps", i, name))
        if len(self.problems) > before:
            return None
        if "seed" in {f.name for f in dataclasses.fields(cls)}:
            good.setdefault("seed", seed)
        try:
            step = cls(**good)
            for option, problem in step.check():
                self._note((*key, name, option), f"steps.{name}.{option}", problem)
        except (ValueError, ImportError) as error:  # an import that only a remote path needs, s3fs say
            self._note(key, f"steps.{name}", str(error))
        return step if len(self.problems) == before else None

    def _flow(self, steps: list[Step], pool_columns: Mapping[str, pa.DataType] | None) -> None:
        """Every column is there before it is read, of a type that fits, is written once, and the writer comes last."""
        types = {f.name: f.type for f in (*POSITION, *SAMPLE)} | dict(pool_columns or {})
        have = dict.fromkeys(types, "the pool")
        for i, step in enumerate(steps):
            key = ("steps", i)
            for column in step.needs:
                if column in have or pool_columns is None:
                    continue
                later = [s.label for s in steps[i + 1 :] if column in s.adds]
                cure = (
                    f"put it below {later[0]}, which adds it"
                    if later
                    else "name the pool's column of pictures as pool.image"
                    if column == INLINE
                    else f"nothing above it adds that{_providers(column) or _nearest(column, have)}"
                )
                if carried(column) in have:
                    cure += f"; the pool's own is called {carried(column)} here"
                self._note(key, f"steps.{step.label}", f"needs the column {column!r}; {cure}")
            for problem in step.check_types(types):
                self._note(key, f"steps.{step.label}", problem)
            for column in step.adds:
                if column in have:
                    cure = (
                        "list the columns to carry in pool.columns"
                        if have[column] == "the pool"
                        else "give it another name"
                    )
                    self._note(
                        key,
                        f"steps.{step.label}",
                        f"adds the column {column!r}, which {have[column]} already has; {cure}",
                    )
                have.setdefault(column, step.label)
            types |= step.adds
            if step.name() == "write_shards" and i != len(steps) - 1:
                self._note(key, f"steps.{step.label}", f"must be the last step; {steps[i + 1].label} comes after it")
        if INLINE in have and not any(INLINE in step.needs for step in steps):
            self._note(("pool", "image"), "pool.image", "no step reads the pictures; write `download: {inline: true}`")


def find_step(name: str) -> type[Step]:
    """The class behind a YAML name: a file in stages/ or filters/, or an import path; ValueError if there is none."""
    modules = [name] if "." in name else [f"{package}.{name}" for package in PACKAGES]
    for module_name in modules:
        try:
            if importlib.util.find_spec(module_name) is None:
                continue
            module = importlib.import_module(module_name)
        except ModuleNotFoundError as error:
            if error.name and module_name.startswith(error.name):
                continue
            raise ValueError(f"{module_name} cannot be imported: {error}") from None
        except Exception as error:
            raise ValueError(f"{module_name} cannot be imported: {type(error).__name__}: {error}") from None
        class_name = "".join(word.capitalize() for word in module_name.rsplit(".", 1)[-1].split("_"))
        found = getattr(module, class_name, None)
        if not (isinstance(found, type) and issubclass(found, Step)):
            raise ValueError(f"{module_name} has no step class {class_name}")
        return found
    if "." in name:
        raise ValueError("no such module; is its folder on PYTHONPATH?")
    raise ValueError(
        f"unknown step{_nearest(name, built_in_steps()) or '; the steps are ' + ', '.join(built_in_steps())}"
    )


def built_in_steps() -> list[str]:
    """The names of the steps that come with Winnow: the file names in stages/ and filters/."""
    return sorted(m.name for p in PACKAGES for m in pkgutil.iter_modules(importlib.import_module(p).__path__))


def _providers(column: str) -> str:
    """A hint at the built-in steps that add a column."""
    found = []
    for name in built_in_steps():
        try:
            if column in find_step(name).adds:
                found.append(name)
        except ValueError:
            continue
    return f"; {' and '.join(found)} would" if found else ""


def split_line(line: Any) -> tuple[str | None, Any]:
    """A line of `steps` as name and options: `- download` or `- download: {timeout: 5}`."""
    if isinstance(line, str):
        return line, None
    if isinstance(line, dict) and len(line) == 1:
        return next(iter(line.items()))
    return None, None


def labels(names: list[str | None]) -> list[str]:
    """`exact_dedup` a second time is `exact_dedup.2`."""
    seen: dict[str, int] = {}
    numbered = []
    for full in names:
        name = str(full).rsplit(".", 1)[-1]
        seen[name] = seen.get(name, 0) + 1
        numbered.append(name if seen[name] == 1 else f"{name}.{seen[name]}")
    return numbered


def _nearest(name: str, known: Any) -> str:
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.6)
    return f"; did you mean {close[0]}?" if close else ""


def _type_name(hint: Any) -> str:
    names: dict[Any, str] = {
        int: "a whole number",
        float: "a number",
        str: "text",
        bool: "true or false",
        type(None): "nothing (null)",
    }
    if hint in names:
        return names[hint]
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin is typing.Literal:
        return "one of " + ", ".join(map(str, args))
    if origin is list:
        return f"a list ({_type_name(args[0])} each)"
    if origin is dict:
        return "a mapping"
    return " or ".join(_type_name(a) for a in args) if args else str(hint)
