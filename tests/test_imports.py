"""Every module of the package imports, has a docstring, and lies in a package that is shipped whole."""

import importlib
from pathlib import Path

import pytest

SRC = Path(__file__).resolve().parents[1] / "src"
# Files, not pkgutil: a folder that lacks its __init__.py would be skipped without a word.
MODULES = sorted(
    ".".join(path.relative_to(SRC).with_suffix("").parts).removesuffix(".__init__")
    for path in (SRC / "seqwise").rglob("*.py")
)


@pytest.mark.parametrize("name", MODULES)
def test_module_imports_and_says_what_it_is(name):
    module = importlib.import_module(name)
    assert module.__file__, f"{name} has no file"
    if not module.__file__.endswith("__init__.py"):
        assert module.__doc__, f"{name} has no docstring"


def test_every_folder_with_code_is_a_package():
    folders = {path.parent for path in (SRC / "seqwise").rglob("*.py")}
    assert not [str(folder) for folder in folders if not (folder / "__init__.py").is_file()]
