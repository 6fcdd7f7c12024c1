"""Frozen, validated, printable hyperparameters: what every method, probe and explainer is.

    str(A2SF(budget=0.25))              -> "A2SF(budget=0.25)"
    Configured.parse("A2SF(budget=0.25)") == A2SF(budget=0.25)

A value is a literal (int, float, str, bool, None or a tuple of them). Text is parsed, never evaluated.
"""

from __future__ import annotations

import ast
import dataclasses
import math
import types
import typing
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, TypeVar, Union

from seqwise.core.errors import UsageError

T = TypeVar("T", bound="Configured")


def param(
    default: Any = dataclasses.MISSING,
    *,
    gt: float | None = None,
    ge: float | None = None,
    lt: float | None = None,
    le: float | None = None,
    doc: str = "",
) -> Any:
    """A hyperparameter with its range beside its default.

    The range holds for each element where the value is a tuple. `doc` ends the error message.
    """
    bounds = {"gt": gt, "ge": ge, "lt": lt, "le": le}
    return dataclasses.field(default=default, metadata={"bounds": bounds, "doc": doc})


def budget_param(default: Any = dataclasses.MISSING, doc: str = "what stays") -> Any:
    """A budget: an int counts tokens (>= 1), a float in (0, 1] is the share kept; `1` and `1.0` differ.

    Where the field's type allows a tuple, it holds one budget per layer.
    """
    return dataclasses.field(default=default, metadata={"budget": True, "doc": doc})


@dataclass(frozen=True)
class Configured:
    """Base of everything that has hyperparameters. Subclasses are `@dataclass(frozen=True)`."""

    abstract: ClassVar[bool] = True  # a class is abstract only if it says so itself

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        cls.abstract = cls.__dict__.get("abstract", False)

    def __post_init__(self) -> None:
        for spec in dataclasses.fields(self):
            _check(self, spec, getattr(self, spec.name))

    def __str__(self) -> str:
        shown = [
            f"{spec.name}={getattr(self, spec.name)!r}"
            for spec in dataclasses.fields(self)
            if spec.metadata.get("budget")
            or getattr(self, spec.name) != spec.default
            or type(getattr(self, spec.name)) is not type(spec.default)
        ]
        return f"{type(self).__name__}({', '.join(shown)})"

    @classmethod
    def parse(cls: type[T], text: str) -> T:
        """Reads what `str()` wrote. Raises UsageError for unknown names, fields or values."""
        try:
            tree = ast.parse(text.strip(), mode="eval").body
        except (SyntaxError, ValueError, RecursionError) as error:
            raise UsageError(f"cannot read {text!r}: {error}. Write it as Name(field=value)") from None
        result = cls._from_ast(tree, text)
        if not isinstance(result, cls):
            raise UsageError(f"{text!r} is a {type(result).__name__}, not a {cls.__name__}")
        return result

    @classmethod
    def _from_ast(cls, tree: ast.expr, text: str) -> Configured:
        if isinstance(tree, ast.Name):
            return cls._named(tree.id)()
        if not isinstance(tree, ast.Call) or not isinstance(tree.func, ast.Name):
            raise UsageError(f"cannot read {text!r}: expected Name(field=value)")
        known = cls._named(tree.func.id)
        if tree.args or any(keyword.arg is None for keyword in tree.keywords):
            raise UsageError(f"cannot read {text!r}: every value needs its field's name, as in budget=0.5")
        names = [spec.name for spec in dataclasses.fields(known)]
        values: dict[str, Any] = {}
        for keyword in tree.keywords:
            name = str(keyword.arg)
            if name in values:
                raise UsageError(f"{known.__name__}.{name} is given twice")
            if name not in names:
                raise UsageError(f"{known.__name__} has no field {name!r}; it has {', '.join(names) or 'none'}")
            try:
                value = ast.literal_eval(keyword.value)
            except ValueError:
                raise UsageError(
                    f"{known.__name__}.{name} must be a literal, got {ast.unparse(keyword.value)!r}"
                ) from None
            values[name] = _frozen(value)
        return known(**values)

    @classmethod
    def _named(cls, name: str) -> type[Configured]:
        found = {**known_classes(cls), **({} if cls.abstract else {cls.__name__: cls})}.get(name)
        if found is None:
            names = ", ".join(sorted(known_classes(cls)))
            raise UsageError(f"unknown {cls.__name__.lower()} {name!r}; known: {names}")
        return found


def known_classes(base: type[T]) -> dict[str, type[T]]:
    """Concrete subclasses of `base` that have been imported so far, by name (the last definition wins)."""
    found: dict[str, type[T]] = {}
    for child in base.__subclasses__():
        if not child.abstract:
            found[child.__name__] = child
        found.update(known_classes(child))
    return found


def _frozen(value: Any) -> Any:
    return tuple(_frozen(item) for item in value) if isinstance(value, (list, tuple)) else value


def _check(owner: Any, spec: dataclasses.Field[Any], value: Any) -> None:
    where = f"{type(owner).__name__}.{spec.name}"
    doc = f" ({spec.metadata['doc']})" if spec.metadata.get("doc") else ""
    if spec.metadata.get("budget"):
        _check_budget(where, value, doc, _hints(type(owner))[spec.name])
        return
    expected = _hints(type(owner))[spec.name]
    if not _matches(value, expected):
        raise ValueError(f"{where} must be {_describe(expected)}, got {value!r}{doc}")
    bounds = spec.metadata.get("bounds")
    if bounds and any(limit is not None for limit in bounds.values()):
        for item in value if isinstance(value, tuple) else (value,):
            if isinstance(item, (int, float)) and not isinstance(item, bool) and not _inside(item, bounds):
                raise ValueError(f"{where} must be {_range(bounds)}, got {item!r}{doc}")


def _check_budget(where: str, value: Any, doc: str, expected: Any) -> None:
    per_layer = any(typing.get_origin(option) is tuple for option in typing.get_args(expected))
    items = value if isinstance(value, tuple) and value and per_layer else (value,)
    for item in items:
        count = isinstance(item, int) and not isinstance(item, bool) and item >= 1
        share = isinstance(item, float) and 0.0 < item <= 1.0
        if not (count or share):
            raise ValueError(
                f"{where} must be a whole number of tokens >= 1 or a share in (0.0, 1.0], got {item!r}{doc}"
            )


def _hints(owner: type) -> dict[str, Any]:
    return typing.get_type_hints(owner)


def _matches(value: Any, expected: Any) -> bool:
    origin, args = typing.get_origin(expected), typing.get_args(expected)
    if expected is Any:
        return True
    if origin is Literal:
        return any(value == choice and type(value) is type(choice) for choice in args)
    if origin in (Union, types.UnionType):
        return any(_matches(value, option) for option in args)
    if origin is tuple:
        if not isinstance(value, tuple):
            return False
        if len(args) == 2 and args[1] is Ellipsis:
            return all(_matches(item, args[0]) for item in value)
        return len(value) == len(args) and all(map(_matches, value, args))
    if expected is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    if expected is int:
        return isinstance(value, int) and not isinstance(value, bool)
    if expected in (None, type(None)):
        return value is None
    return isinstance(value, expected)


def _describe(expected: Any) -> str:
    origin, args = typing.get_origin(expected), typing.get_args(expected)
    if origin is Literal:
        return "one of " + ", ".join(map(repr, args))
    if origin in (Union, types.UnionType):
        return " or ".join(_describe(option) for option in args)
    if origin is tuple:
        return f"a tuple of {_describe(args[0])}" if args else "a tuple"
    if expected in (None, type(None)):
        return "None"
    return {float: "a number", int: "a whole number", str: "a text", bool: "True or False"}.get(
        expected, getattr(expected, "__name__", str(expected))
    )


def _inside(value: float, bounds: dict[str, float | None]) -> bool:
    gt, ge, lt, le = bounds["gt"], bounds["ge"], bounds["lt"], bounds["le"]
    return (
        (gt is None or value > gt)
        and (ge is None or value >= ge)
        and (lt is None or value < lt)
        and (le is None or value <= le)
    )


def _range(bounds: dict[str, float | None]) -> str:
    gt, ge, lt, le = bounds["gt"], bounds["ge"], bounds["lt"], bounds["le"]
    low, high = (gt if ge is None else ge), (lt if le is None else le)
    if low is None:
        return f"{'<' if le is None else '<='} {high}"
    if high is None:
        return f"{'>' if ge is None else '>='} {low}"
    return f"in {'(' if ge is None else '['}{low}, {high}{')' if le is None else ']'}"
