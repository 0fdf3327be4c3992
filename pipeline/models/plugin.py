"""Loads objects that a recipe names by import path: OCR engines, detectors, scorers."""

from __future__ import annotations

import importlib
import importlib.util
import re
from importlib.machinery import SourceFileLoader
from typing import Any


def problem(path: str) -> str | None:
    """Why an import path is unusable, or None. Imports the parent packages, but not the module itself, which may be
    slow to import: its source is searched for the name."""
    module, colon, name = path.partition(":")
    if not (colon and all(part.isidentifier() for part in module.split(".")) and name.isidentifier()):
        return f"expected an import path such as my_package.my_module:MyClass, found {path!r}"
    try:
        spec = importlib.util.find_spec(module)
    except Exception as error:  # a package may raise anything when it is imported
        return f"{module} cannot be imported: {error}"
    if spec is None:
        return f"no module named {module}; is its folder on PYTHONPATH?"
    source = spec.loader.get_source(module) if isinstance(spec.loader, SourceFileLoader) else None
    if source is None or "import *" in source or "__getattr__" in source or re.search(rf"\b{name}\b", source):
        return None
    return f"{module} has no {name}; expected a class or function that is called without arguments"


def load(path: str) -> Any:
    """Calls the class or function at the import path `module:name` without arguments, and returns the result.

    Raises ValueError if there is none.
    """
    if (found := problem(path)) is not None:
        raise ValueError(found)
    module, _, name = path.partition(":")
    try:
        return getattr(importlib.import_module(module), name)()
    except AttributeError as error:
        raise ValueError(f"{path}: {error}") from error
