"""Dataclass trees of this library as JSON, checked field by field on the way back."""

import dataclasses
import importlib
from collections.abc import Iterator
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from bestiary.layers.base import Tree


def to_json(value: Any) -> Tree:
    """A dataclass tree of this library as JSON values: each object names its class."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        kind = f"{type(value).__module__}.{type(value).__qualname__}"
        fields = {f.name: to_json(getattr(value, f.name)) for f in dataclasses.fields(value)}
        return {"class": kind} | fields
    if isinstance(value, (list, tuple)):
        return [to_json(v) for v in value]
    if isinstance(value, dict):
        return {k: to_json(v) for k, v in value.items()}
    return value


def from_json(value: Tree) -> Any:
    """The inverse of `to_json`. Raises ValueError for a class or field that the library lacks."""
    if isinstance(value, list):
        return tuple(from_json(v) for v in value)
    if not isinstance(value, dict):
        return value
    fields = {name: from_json(v) for name, v in value.items() if name != "class"}
    if "class" not in value:
        return fields
    module, _, name = str(value["class"]).rpartition(".")
    try:
        if not module.startswith("bestiary."):
            raise ImportError(module)
        cls = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError):
        raise ValueError(f"class: this version has no {value['class']!r}") from None
    if not (isinstance(cls, type) and dataclasses.is_dataclass(cls)):
        raise ValueError(f"class: {value['class']!r} is not a part of an experiment")
    hints = {f.name: get_type_hints(cls)[f.name] for f in dataclasses.fields(cls)}
    for field, given in fields.items():
        if field not in hints:
            raise ValueError(f"{name}: unknown field {field!r}; known: {', '.join(hints)}")
        if not _fits(given, hints[field]):
            told = str(getattr(hints[field], "__name__", hints[field]))
            raise ValueError(f"{name}.{field}: {_brief(given)}; need {told}")
    try:
        return cls(**fields)
    except TypeError as error:
        raise ValueError(f"{name}: {error}") from None


def _fits(value: Any, hint: Any) -> bool:
    """Whether a value read from JSON is of the annotated type."""
    origin, args = get_origin(hint), get_args(hint)
    if hint is Any:
        return True
    if origin is Literal:
        return any(value == a and type(value) is type(a) for a in args)
    if origin in (Union, UnionType):
        return any(_fits(value, a) for a in args)
    if origin is dict:
        return isinstance(value, dict) and all(_fits(v, args[1]) for v in value.values())
    if origin is tuple:
        if not isinstance(value, tuple):
            return False
        each = args[:1] * len(value) if args[-1] is ... else args
        return len(each) == len(value) and all(map(_fits, value, each))
    if hint is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, type(None) if hint is None else origin or hint)


def _brief(value: Any) -> str:
    return f"a {type(value).__name__}" if dataclasses.is_dataclass(value) else repr(value)[:80]


def difference(old: Any, new: Any) -> dict[str, tuple[Any, Any]]:
    """The fields in which two experiments differ, by dotted path, with the value in each."""
    before, after = dict(_leaves(to_json(old))), dict(_leaves(to_json(new)))
    paths = [path for path in before | after if before.get(path) != after.get(path)]
    return {path: (before.get(path), after.get(path)) for path in paths}


def _leaves(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    if not isinstance(value, (dict, list)) or not value:
        yield path, value
        return
    children = value.items() if isinstance(value, dict) else enumerate(value)
    for name, child in children:
        yield from _leaves(child, f"{path}.{name}" if path else str(name))
