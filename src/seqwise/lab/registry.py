"""Methods by name, wherever they are written: in the package, in installed plugins, in a file of your own.

A subclass of `Method` is known once its module has been imported; this imports them.
"""

from __future__ import annotations

import dataclasses
import importlib
import importlib.util
import pkgutil
import sys
from collections.abc import Iterable, Sequence
from importlib import metadata
from pathlib import Path

import seqwise.methods
from seqwise.core.config import known_classes
from seqwise.core.errors import SeqwiseError, UsageError
from seqwise.core.method import Composition, Method

ENTRY_POINTS = "seqwise.methods"


def load_methods(plugins: Iterable[str | Path] = ()) -> dict[str, type[Method]]:
    """Every method by its name: the package's, then those of installed plugins, then those of the files `plugins`.

    The last definition of a name wins. Raises UsageError for a plugin that is missing or fails to import.
    """
    for module in pkgutil.walk_packages(seqwise.methods.__path__, f"{seqwise.methods.__name__}."):
        importlib.import_module(module.name)
    for point in metadata.entry_points(group=ENTRY_POINTS):
        try:
            point.load()
        except Exception as error:
            raise UsageError(f"the installed plugin {point.value!r} cannot be imported: {_cause(error)}") from error
    for plugin in plugins:
        _load_file(Path(plugin).expanduser())
    return known_classes(Method)


def parse_methods(texts: Sequence[str], budgets: Sequence[str] = ()) -> list[Method]:
    """Methods from text, each once, in order of appearance. Text is parsed, never evaluated.

    budgets: what `budget` becomes, one method for each ("0.25" a share, "256" tokens); parts of a composition get
    the same one, and methods without the field, or with one per stage, stay as they are. Raises UsageError for what
    cannot be read.
    """
    shares = [_budget(text) for text in budgets]
    methods: list[Method] = []
    for text in texts:
        try:
            method = Method.parse(text)
            methods += [_with_budget(method, share) for share in shares] if shares else [method]
        except SeqwiseError:
            raise
        except (ValueError, TypeError) as error:  # a bad hyperparameter, or one without a default left out
            raise UsageError(f"cannot use {text!r}: {error}") from None
    return list(dict.fromkeys(methods))


def _with_budget(method: Method, budget: int | float) -> Method:
    if isinstance(method, Composition):
        return Composition.of(*(_with_budget(part, budget) for part in method.parts))
    if isinstance(getattr(method, "budget", ()), tuple):  # none, or one per stage or layer
        return method
    return dataclasses.replace(method, budget=budget)  # type: ignore[call-arg]


def _budget(text: str) -> int | float:
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    raise UsageError(f"--budget must be a whole number of tokens >= 1 or a share in (0.0, 1.0], got {text!r}")


def _load_file(path: Path) -> None:
    if not path.is_file():
        raise UsageError(f"no plugin at {path}: --plugin takes a Python file")
    name = f"seqwise_plugin_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise UsageError(f"cannot import {path}: --plugin takes a Python file, its name ends with .py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their annotations up there
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        del sys.modules[name]
        raise UsageError(f"plugin {path} cannot be imported: {_cause(error)}") from error


def _cause(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"
