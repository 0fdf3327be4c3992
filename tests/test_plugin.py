from __future__ import annotations

import pytest

from pipeline.models import plugin
from tests.plugins import Redness


def test_what_a_recipe_names_is_called_once() -> None:
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
def test_what_is_not_there(path: str, message: str) -> None:
    assert message in str(plugin.problem(path))
    with pytest.raises(ValueError, match=r"import|module"):
        plugin.load(path)


def test_a_module_without_that_name() -> None:
    with pytest.raises(ValueError, match=r"tests.plugins has no Nothing; expected a class or function"):
        plugin.load("tests.plugins:Nothing")
