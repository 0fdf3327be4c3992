"""Loads a recipe from YAML and checks it. All problems are reported together, before anything starts."""

from __future__ import annotations

import dataclasses
import importlib
import importlib.util
import json
import math
import os
import pkgutil
import re
import typing
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import pyarrow as pa
import pydantic
import yaml

from pipeline.schema import INLINE, POSITION, SAMPLE, carried
from pipeline.step import JOB_FOLDER, Sink, Step
from pipeline.storage import Store, special_file
from trainer.spelling import did_you_mean
from trainer.yamlfile import Document

PACKAGES = ("pipeline.stages", "pipeline.filters")
MAX_NAME = 255
"""Bytes in the name of a file or folder."""
BOUNDS = {"unit_rows": (1, 1_000_000), "workers": (1, 100_000)}


class RecipeError(Exception):
    """All problems of a recipe, one per line."""

    def __init__(self, problems: list[str]) -> None:
        super().__init__("\n".join(problems))
        self.problems = problems


@dataclass(kw_only=True)
class PoolSpec:
    """The source of the candidate rows."""

    path: str | list[str] = ""
    """A file, a glob, a folder, or a list of these: parquet, csv, tsv, jsonl or json, also `.gz`, `.zst` and `.bz2`; or
    Common Crawl's `.wat.gz`. Required unless `retry` is given."""
    retry: str | None = None
    """A finished run: the pool is its rows that failed for a transient reason. Excludes all other keys but `rows`."""
    url: str = "url"
    """The column that holds the URL."""
    caption: str = "caption"
    """The column that holds the caption."""
    uid: str | None = None
    """The column that holds the pool's own uids (32 hex digits). By default they are computed from url and caption."""
    image: str | None = None
    """The column that holds the encoded pictures: bytes, or Hugging Face's struct of `bytes` and `path`."""
    columns: list[str] | None = None
    """Further columns to carry into the shards; `[]` for none. By default all."""
    types: dict[str, Literal["text", "int", "float"]] | None = None
    """Types of further columns of text files, where the first 1,000 rows suggest a wrong one."""
    names: list[str] | None = None
    """Column names of csv and tsv files without a header line."""
    delimiter: str | None = None
    """The character between fields, such as `;`. By default a comma in csv and a tab in tsv."""
    quoted: bool | None = None
    """Whether quotation marks enclose fields (RFC 4180) or are data. By default they enclose fields in csv and are data
    in tsv."""
    embeddings: dict[str, str] | None = None
    """Vector columns from NumPy files beside parquet tables, as `{image_embedding: "{stem}.npz#l14_img"}`
    (CommonPool) or `{image_embedding: "../img_emb/img_emb_{number}.npy"}` (clip-retrieval)."""
    captions: Literal["each", "first"] | None = None
    """For a column of caption lists: `each` makes a row of each caption, `first` takes the first."""
    rows: int | None = None
    """Expected number of rows. `--plan` uses it for a remote pool, which it does not count."""

    def __post_init__(self) -> None:
        if self.rows is not None and self.rows < 0:
            raise ValueError(f"rows: must be 0 or more, found {self.rows}")
        if self.retry is None:
            if not self.path:
                raise ValueError("path: is missing")
            self._check()
            return
        others = (f for f in dataclasses.fields(self) if f.name not in ("retry", "rows"))
        if given := [f.name for f in others if getattr(self, f.name) != f.default]:
            raise ValueError(f"retry: excludes {', '.join(given)}: the rows are those of {self.retry}/drops")
        # The drop tables hold url, caption and uid.
        self.path, self.uid, self.columns = f"{self.retry.rstrip('/')}/drops/*.parquet", "uid", []

    @property
    def paths(self) -> list[str]:
        """`path` as a list."""
        return [self.path] if isinstance(self.path, str) else self.path

    @property
    def is_local(self) -> bool:
        return not any("://" in path for path in self.paths)

    def _check(self) -> None:
        for key in ("names", "columns"):
            names = getattr(self, key) or []
            if twins := sorted({name for name in names if names.count(name) > 1}):
                raise ValueError(f"{key}: {', '.join(twins)}: named more than once")
        if self.names is not None:
            for key in ("url", "caption", "uid"):
                if (column := getattr(self, key)) is not None and column not in self.names:
                    raise ValueError(f"names: {column!r}, the {key}, is not among {', '.join(self.names) or 'none'}")
        if self.delimiter is not None and (len(self.delimiter) != 1 or self.delimiter in '"\r\n\0'):
            raise ValueError(f"delimiter: must be one character, such as ';' or '|', found {self.delimiter!r}")
        if self.captions == "each" and self.uid is not None:
            raise ValueError("captions: each makes several rows of one uid; leave out uid, or take the first")
        mapped = [name for name in (self.url, self.caption, self.uid, self.image) if name is not None]
        if twins := sorted({name for name in mapped if mapped.count(name) > 1}):
            raise ValueError(f"url, caption, uid, image: {', '.join(twins)}: one column cannot serve as two of these")
        for key in ("columns", "types"):
            if twins := [name for name in getattr(self, key) or () if name in mapped]:
                raise ValueError(f"{key}: {', '.join(twins)} already used as url, caption, uid or image")


PoolColumns = Callable[[PoolSpec], Mapping[str, pa.DataType] | None]


@dataclass(kw_only=True)
class Recipe:
    """A checked recipe. `source` is the YAML data it was built from, without defaults."""

    name: str
    """Names the dataset in the manifest and the dataset card: 1 to 200 printable characters."""
    pool: PoolSpec
    """Where the candidates are: a mapping of the keys below."""
    run: str
    """Folder of the run: a local path, or an address such as `s3://bucket/folder` or `gs://bucket/folder`."""
    steps: list[Step] = field(default_factory=list)
    """The steps, in the order in which they run: `- NAME` or `- NAME: {OPTION: VALUE, …}`. At least one."""
    seed: int = 0
    """Seed of every random decision, and the default of every step's `seed` option."""
    unit_rows: int = 10_000
    """Approximate number of candidates in a unit, 1 to 1,000,000. Units are scheduled, retried, committed and resumed
    as a whole."""
    workers: int | None = None
    """Maximum number of worker processes, 1 to 100,000. By default one per core of the cluster, including nodes that
    join during the run. Never changes a result."""
    reuse: str | None = None
    """Another run whose results to reuse: its complete passes where they are the same, and its measurements of the same
    rows, even if the pools differ. Its pictures are not copied, so it must stay where it is."""
    report: bool = True
    """Whether to write `RUN/report/index.html` at the end of the run. `winnow report RUN` writes it at any time."""
    allow_empty: bool = False
    """Whether to exit with status 0 instead of 1 if a run that writes shards keeps no row."""
    source: dict[str, Any] = field(default_factory=dict)

    def notes(self) -> Iterator[str]:
        """Yields one line for each thing that a step leaves undone with its options, or that this machine lacks."""
        if missing := Store(self.run).missing_package():
            yield f"run: {missing}"
        for step in self.steps:
            yield from (f"{step.label}: {note}" for note in step.notes())


def load(
    path: str,
    overrides: list[str] | None = None,
    pool_columns: PoolColumns | None = None,
) -> Recipe:
    """Reads and checks a recipe file.

    `overrides` are `key=value` words with YAML values: `seed=1`, `pool.path=x.parquet`, `steps.download.timeout=5`.
    `pool_columns` returns the types of the pool's extra columns, or None if they are unknown; it raises ValueError if
    the pool cannot be read. Raises RecipeError.
    """
    document = Document.read(path)
    problems = document.problems
    if not problems and not isinstance(document.data, dict):
        problems.append(f"{path}: expected a mapping with the keys name, pool, run, steps")
    if isinstance(document.data, dict):
        for word in overrides or []:
            _override(document.data, word, problems)
    if problems:
        raise RecipeError(problems)
    recipe = _Checker(document, problems).recipe(pool_columns)
    if problems or recipe is None:
        raise RecipeError(problems)
    return recipe


def identity(step: Step) -> dict[str, Any]:
    """Everything that determines a step's output: class, version, options, and contents of the files that they name.

    Excludes options that only change speed: fields with `metadata={"speed": True}`.
    """
    options = {f.name: getattr(step, f.name) for f in dataclasses.fields(step) if not f.metadata.get("speed")}
    return {
        "step": f"{type(step).__module__}.{type(step).__qualname__}",
        "version": step.version,
        "options": json.loads(json.dumps(options, default=str)),
        "contents": step.fingerprint(),
    }


def _override(data: dict[str, Any], word: str, problems: list[str]) -> None:
    """Applies one `key=value` word to the data of a recipe."""
    name, equals, text = word.partition("=")
    if not equals or not name:
        problems.append(f"{word!r}: an override is key=value, for example steps.download.timeout=5")
        return
    found = Document(text)
    if found.problems:
        problems += [f"{word!r}: the value: {problem}" for problem in found.problems]
        return
    if not name.startswith("steps."):
        target = data
        *parents, last = name.split(".")
        for parent in parents:
            target = target.setdefault(parent, {})
            if not isinstance(target, dict):
                problems.append(f"{word!r}: {parent} is not a mapping")
                return
        target[last] = found.data
        return
    label, _, option = name.removeprefix("steps.").rpartition(".")
    steps = data.get("steps")
    steps = steps if isinstance(steps, list) else []
    known = labels([split_line(line)[0] for line in steps])
    if label not in known:
        step = label or option
        if step in known:
            problems.append(f"{word!r}: expected an option of the step, as in steps.{step}.OPTION={text}")
        else:
            problems.append(f"{word!r}: the recipe has no step {step!r}{did_you_mean(step, known)}")
        return
    i = known.index(label)
    step_name, options = split_line(steps[i])
    steps[i] = {step_name: {**(options if isinstance(options, dict) else {}), option: found.data}}


class _Checker:
    """Builds a Recipe from a document and collects every problem."""

    def __init__(self, document: Document, problems: list[str]) -> None:
        self.document, self.problems = document, problems

    def recipe(self, pool_columns: PoolColumns | None) -> Recipe | None:
        data = dict(self.document.data)
        step_lines, pool_data = data.pop("steps", None), data.pop("pool", None)
        top = self._options(Recipe, data, (), hidden=frozenset({"steps", "pool", "source"}))
        pool = self._pool(pool_data)
        if not isinstance(step_lines, list) or not step_lines:
            self._note(("steps",), "steps", "expected a list of steps, as in `- caption_length: {min_chars: 6}`")
            step_lines = []
        for key, (low, high) in BOUNDS.items():
            if (value := top.get(key)) is not None and not low <= value <= high:
                self._note((key,), key, f"expected {low:,} to {high:,}, found {value:,}")
        if "name" in top and not (top["name"].strip() and top["name"].isprintable() and len(top["name"]) <= 200):
            self._note(("name",), "name", "expected a line of 1 to 200 printable characters")
        self._places(top.get("run"), top.get("reuse"), pool)
        steps = [
            step for i, line in enumerate(step_lines) if (step := self._step(i, line, top.get("seed", 0))) is not None
        ]
        for step, label in zip(steps, labels([s.name() for s in steps]), strict=True):
            step.__dict__["_label"] = label
        columns: Mapping[str, pa.DataType] | None = {}
        if pool is not None and pool_columns is not None:
            try:
                columns = None if any(map(_job_copy_problem, pool.paths)) else pool_columns(pool)
            except (ValueError, OSError, ImportError) as error:
                columns = None
                self._note(("pool",), "pool", str(error))
        if len(steps) == len(step_lines):
            self._flow(steps, columns)
        if self.problems or pool is None:
            return None
        return Recipe(**top, pool=pool, steps=steps, source=self.document.data)

    def _places(self, run: str | None, reuse: str | None, pool: PoolSpec | None) -> None:
        """Checks that the run is writable, that `reuse` is a run, and that run and pool do not overlap."""
        if run is not None:
            problem = _unusable_run(run)
            if problem is None and pool is not None and any(_overlap(path, run) for path in pool.paths):
                problem = "must not share a folder with the pool: its files would be read as part of the pool"
            if problem:
                self._note(("run",), "run", problem)
        if pool is not None:
            key = "path" if pool.retry is None else "retry"
            for problem in filter(None, map(_job_copy_problem, pool.paths)):
                self._note(("pool", key), f"pool.{key}", problem)
        if reuse is not None and (problem := _unusable_reuse(reuse, run)):
            self._note(("reuse",), "reuse", problem)

    def _note(self, key: tuple[Any, ...], name: str, problem: str) -> None:
        self.problems.append(f"{self.document.where(*key)}: {name}: {problem}")

    def _options(
        self, cls: type, data: dict[str, Any], key: tuple[Any, ...], hidden: frozenset[str] = frozenset()
    ) -> dict[str, Any]:
        """The options that match the fields of a dataclass. Reports unknown, ill-typed and missing ones."""
        prefix = ".".join(str(k) for k in key if not isinstance(k, int)) + ("." if key else "")
        fields = {f.name: f for f in dataclasses.fields(cls) if f.name not in hidden}
        hints = typing.get_type_hints(cls)
        good = {}
        for name, value in data.items():
            if name not in fields:
                known = f"; the keys are {', '.join(fields)}" if fields else "; it has no options"
                self._note((*key, name), prefix + name, f"unknown key{did_you_mean(name, fields) or known}")
                continue
            try:
                good[name] = pydantic.TypeAdapter(hints[name]).validate_python(value, strict=True)
            except pydantic.ValidationError:
                self._note((*key, name), prefix + name, f"expected {_type_name(hints[name])}, found {value!r}")
                continue
            if key and (problem := _unusable_text(fields[name], value)):
                self._note((*key, name), prefix + name, problem)
                continue
            if (odd := _unusable_number(value)) is not None:
                self._note((*key, name), prefix + name, f"expected a finite number that fits in 63 bits, found {odd!r}")
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
        except (ValueError, ImportError) as error:  # for example s3fs, which only remote paths need
            self._note(key, f"steps.{name}", str(error))
        return step if len(self.problems) == before else None

    def _flow(self, steps: list[Step], pool_columns: Mapping[str, pa.DataType] | None) -> None:
        """Checks that columns exist before use, with fitting types and unique names, and that a sink is last."""
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
                    else f"no step above it adds that column{_providers(column) or did_you_mean(column, have)}"
                )
                if carried(column) in have:
                    cure += f"; the pool's own column of that name is called {carried(column)}"
                self._note(key, f"steps.{step.label}", f"needs the column {column!r}; {cure}")
            for option, problem in step.check_columns(types):
                self._note((*key, step.name(), option), f"steps.{step.label}.{option}", problem)
            for column in step.adds:
                if column in have and column not in step.wants:
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
            if isinstance(step, Sink) and i != len(steps) - 1:
                self._note(key, f"steps.{step.label}", f"must be the last step; {steps[i + 1].label} comes after it")
        if INLINE in have and not any(INLINE in step.needs for step in steps):
            self._note(("pool", "image"), "pool.image", "no step reads the pictures; write `download: {inline: true}`")


def find_step(name: str) -> type[Step]:
    """The step class for a YAML name: a file in stages/ or filters/, or an import path. Raises ValueError if none."""
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
        f"unknown step{did_you_mean(name, built_in_steps()) or '; the steps are ' + ', '.join(built_in_steps())}"
    )


def built_in_steps() -> list[str]:
    """The names of the steps that come with Winnow: the file names in stages/ and filters/."""
    return sorted(m.name for p in PACKAGES for m in pkgutil.iter_modules(importlib.import_module(p).__path__))


def _unusable_number(value: Any) -> float | None:
    """The first number in an option's value that is NaN, infinite, or beyond 63 bits; None if there is none."""
    if isinstance(value, list | dict):
        items = value.values() if isinstance(value, dict) else value
        return next((odd for item in items if (odd := _unusable_number(item)) is not None), None)
    if isinstance(value, float) and not math.isfinite(value):
        return value
    return value if isinstance(value, int) and abs(value) >= 1 << 63 else None


def _unusable_text(f: dataclasses.Field[Any], value: Any) -> str | None:
    """The problem with an option that is or holds blank text, or names a device, pipe or socket; else None."""
    values = value if isinstance(value, list) else [*value, *value.values()] if isinstance(value, dict) else [value]
    texts = [text for text in values if isinstance(text, str)]
    if value != f.default and any(not text.strip() for text in texts):
        return f"expected text that is not blank, found {value!r}; leave the key out for the default"
    if f.metadata.get("file"):
        for path in texts:
            if (problem := special_file(path)) is not None:
                return problem
    return None


def _job_copy_problem(path: str) -> str | None:
    """The problem with a local path inside a job's copy of its working directory; None for any other path."""
    if "://" in path or JOB_FOLDER not in os.path.abspath(path) + "/":
        return None
    return (
        f"{path} lies in the job's temporary copy of its working directory, which is separate on each node; expected "
        "an absolute path that every node can access, or an address such as s3://bucket/folder (see docs/cluster.md)"
    )


def _unusable_run(run: str) -> str | None:
    """Why a run directory cannot be written to; None if it can."""
    if not run.strip():
        return "is empty; expected a folder, as in runs/first, or an address such as s3://bucket/folder"
    if not run.isprintable():
        return f"expected a path without control characters, found {run!r}"
    store = Store(run)
    if not store.local:
        if not run.partition("://")[2].strip("/"):
            return f"{run} names no bucket or folder; expected an address such as s3://bucket/folder"
        try:
            store.missing_package()
        except ValueError as error:
            return f"{run} cannot be used: {error}"
        return None
    if problem := _job_copy_problem(run):
        return problem
    if any(len(os.fsencode(part)) > MAX_NAME for part in store.root.split("/")):
        return f"expected names of at most {MAX_NAME} bytes in the path, found {run[:100]!r}…"
    above = store.root
    while not os.path.lexists(above):
        above = os.path.dirname(above)
    if not os.path.isdir(above):
        return f"{above} is a file; expected a folder, or a path that does not exist yet"
    if not os.access(above, os.W_OK | os.X_OK):
        return f"{above} is not writable; expected a folder that this user can write to"
    return None


def _unusable_reuse(reuse: str, run: str | None) -> str | None:
    """Why a run directory cannot be reused; None if it can."""
    if problem := _job_copy_problem(reuse):
        return problem
    if not reuse.strip():
        return "is empty; expected the folder of a run, or null"
    try:
        if run is not None and Store(reuse).root == Store(run).root:
            return "is the run itself"
        if Store(reuse).exists("run.json"):
            return None
    except Exception as error:  # an unreachable store can raise anything
        return f"{reuse} cannot be read: {type(error).__name__}: {error}"
    return f"{reuse} is not the folder of a run: missing {Store(reuse).path('run.json')}"


def _overlap(pool: str, run: str) -> bool:
    """Whether pool and run overlap: a folder or pattern of the pool contains the run or lies in it, or a pool file lies
    in a subfolder of the run."""
    if "://" in pool or not Store(run).local:
        return pool.rstrip("/") == run.rstrip("/")
    root = os.path.realpath(run)
    fixed = re.split(r"[*?[]", pool, maxsplit=1)[0]
    folder = os.path.realpath(pool if os.path.isdir(pool) else os.path.dirname(fixed))
    if os.path.isdir(pool) or fixed != pool:
        return _within(folder, root) or (_within(root, folder) and (os.path.isdir(pool) or "**" in pool))
    return _within(folder, root) and folder != root


def _within(inner: str, outer: str) -> bool:
    return os.path.commonpath([inner, outer]) == outer


def _providers(column: str) -> str:
    """A hint that names the built-in steps that add a column."""
    found = []
    for name in built_in_steps():
        try:
            if column in find_step(name).adds:
                found.append(name)
        except ValueError:
            continue
    return f"; {' or '.join(found)} adds it" if found else ""


def split_line(line: Any) -> tuple[str | None, Any]:
    """Splits a line of `steps` into name and options: `- download` or `- download: {timeout: 5}`."""
    if isinstance(line, str):
        return line, None
    if isinstance(line, dict) and len(line) == 1:
        return next(iter(line.items()))
    return None, None


def line_text(line: Any) -> str:
    """A line of `steps` as YAML: `threshold: {column: clip_score, min: 0.3}`."""
    name, options = split_line(line)
    if not isinstance(line, dict):
        return str(name)
    flow = yaml.safe_dump(options or {}, default_flow_style=True, sort_keys=False, allow_unicode=True, width=1 << 30)
    return f"{name}: {flow.strip()}"


def labels(names: list[str | None]) -> list[str]:
    """Unique labels for step names: the second `exact_dedup` becomes `exact_dedup.2`."""
    seen: dict[str, int] = {}
    numbered = []
    for full in names:
        name = str(full).rsplit(".", 1)[-1]
        seen[name] = seen.get(name, 0) + 1
        numbered.append(name if seen[name] == 1 else f"{name}.{seen[name]}")
    return numbered


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
