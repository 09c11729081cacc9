"""Frozen dataclasses as JSON has them, and back, strictly. Knows no message."""

from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from functools import cache
from itertools import chain
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

from runner.errors import OptionError

Fields = TypeVar("Fields")


def fields_of(value: object) -> dict[str, object]:
    """A dataclass as JSON has it: what `json.dumps` needs as its `default`."""
    return {each.name: getattr(value, each.name) for each in fields(value)}  # type: ignore[arg-type]


def parse(cls: type[Fields], values: object) -> Fields:
    """Make the dataclass `cls` from a received object; a field left out keeps its default.

    Raises OptionError that names a field which is unknown, missing or of a wrong type.
    """
    if not isinstance(values, Mapping):
        raise OptionError(f"{cls.__name__} must be an object, not {values!r:.40}")
    types = _types(cls)  # type: ignore[arg-type]
    unknown = set(values) - set(types)
    if unknown:
        raise OptionError(f"{cls.__name__} has no field {', '.join(sorted(unknown))}")
    parsed = {name: _parse_value(name, types[name], value) for name, value in values.items()}
    try:
        return cls(**parsed)
    except TypeError as error:
        missing = [f.name for f in fields(cls) if f.name not in values]  # type: ignore[arg-type]
        raise OptionError(f"{cls.__name__} lacks a field: {', '.join(missing)}") from error


def _parse_value(name: str, expected: Any, value: Any) -> Any:
    if is_dataclass(expected):
        return parse(expected, value)  # type: ignore[arg-type]
    known = [kind for kind in get_args(expected) if is_dataclass(kind)]
    if known and isinstance(value, Mapping):  # a dataclass or None
        return parse(known[0], value)  # type: ignore[arg-type]
    if get_origin(expected) is tuple and isinstance(value, list):
        return _parse_tuple(name, get_args(expected), value)
    if expected is float and type(value) is int:
        return float(value)
    if not _fits(expected, value):
        raise OptionError(f"{name} must be of type {expected}, not {value!r:.40}")
    return value


def _parse_tuple(name: str, items: tuple[Any, ...], value: list[Any]) -> tuple[Any, ...]:
    """items: of the tuple's type, as (int, ...) or (int, int)."""
    first, *others = items
    if others != [...] and len(value) != len(items):
        raise OptionError(f"{name} must have {len(items)} values, not {len(value)}")
    if set(others) <= {first, ...} and set(map(type, value)) <= {first}:
        return tuple(value)  # a snapshot has thousands of numbers
    if others == [...] and get_origin(first) is tuple and _are_rows(get_args(first), value):
        return tuple(map(tuple, value))
    if others == [...]:
        return tuple(_parse_value(name, first, item) for item in value)
    return tuple(_parse_value(name, kind, item) for kind, item in zip(items, value, strict=True))


def _are_rows(items: tuple[Any, ...], value: list[Any]) -> bool:
    """Whether value has nothing but lists of integers, as (int, ...) or (int, int) wants them."""
    if set(items) - {...} != {int} or not set(map(type, value)) <= {list}:
        return False
    has_length = items[-1] is ... or set(map(len, value)) <= {len(items)}
    return has_length and set(map(type, chain.from_iterable(value))) <= {int}


def _fits(expected: Any, value: Any) -> bool:
    if get_origin(expected) is dict:
        return isinstance(value, dict) and all(
            isinstance(key, str) and isinstance(item, str) for key, item in value.items()
        )
    if get_origin(expected) is tuple:
        return False  # a list was taken apart before
    choices = get_args(expected) or (expected,)
    return type(value) in choices  # exact, so that a bool is no int


@cache
def _types(cls: type) -> dict[str, Any]:
    return get_type_hints(cls)
