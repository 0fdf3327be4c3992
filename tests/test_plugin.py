from __future__ import annotations

import pytest

from pipeline.models import plugin
from tests.plugins import Redness


def test_a_class_is_loaded_by_its_import_path() -> None:
    assert plugin.problem("tests.plugins:Redness") is None
    assert isinstance(plugin.load("tests.plugins:Redness"), Redness)


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("tests.plugins", "expected an import path such as my_package.my_module:MyClass, found 'tests.plugins'"),
        ("tests.plugins:", "expected an import path"),
        ("a b:C", "expected an import path"),
        ("no_such_package.module:Scorer", "no_such_package.module cannot be imported: No module named"),
        ("no_such_package:Scorer", "no module named no_such_package; is its folder on PYTHONPATH?"),
    ],
)
def test_a_bad_import_path_is_reported(path: str, message: str) -> None:
    assert message in str(plugin.problem(path))
    with pytest.raises(ValueError, match=r"import|module"):
        plugin.load(path)


def test_a_missing_name_in_a_module_is_reported() -> None:
    with pytest.raises(ValueError, match=r"tests.plugins has no Nothing; expected a class or function"):
        plugin.load("tests.plugins:Nothing")
