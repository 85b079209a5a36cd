"""The part of JSON Schema that our own files use, checked without a dependency.

Known: type, const, enum, required, properties, additionalProperties, items, pattern, minimum,
minLength, maxLength, maxItems, anyOf, $ref into $defs. An unknown keyword is an error in the
schema, not silently ignored. The tests hold this against the `jsonschema` package.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

_ANNOTATIONS = {"$schema", "$id", "$defs", "title", "description"}
_TYPES: dict[str, tuple[type, ...]] = {
    "object": (dict,),
    "array": (list,),
    "string": (str,),
    "integer": (int,),
    "number": (int, float),
    "boolean": (bool,),
    "null": (type(None),),
}


def violation(value: Any, schema: Mapping[str, Any], where: str = "") -> str | None:
    """The first way in which a decoded JSON value breaks a schema, as `where: what`, or None."""
    return _Checker(schema).check(value, schema, where)


class _Checker:
    def __init__(self, root: Mapping[str, Any]) -> None:
        self.definitions: Mapping[str, Any] = root.get("$defs", {})

    def check(self, value: Any, schema: Mapping[str, Any], where: str) -> str | None:
        if "$ref" in schema:
            schema = self.definitions[schema["$ref"].removeprefix("#/$defs/")]
        for keyword, argument in schema.items():
            if keyword in _ANNOTATIONS:
                continue
            if keyword in ("additionalProperties",):
                found = self.additional(value, schema, where)
            else:
                found = getattr(self, f"_{keyword}")(value, argument, where)
            if found:
                return str(found)
        return None

    def _type(self, value: Any, names: str | list[str], where: str) -> str | None:
        wanted = [names] if isinstance(names, str) else names
        if any(_is(value, name) for name in wanted):
            return None
        return f"{where or 'top level'}: {_kind(value)} where {' or '.join(wanted)} is due"

    def _const(self, value: Any, wanted: Any, where: str) -> str | None:
        return None if _same(value, wanted) else f"{where}: {_brief(value)}, must be {wanted!r}"

    def _enum(self, value: Any, wanted: list[Any], where: str) -> str | None:
        if any(_same(value, one) for one in wanted):
            return None
        return f"{where}: {_brief(value)} is none of {', '.join(map(str, wanted))}"

    def _required(self, value: Any, names: list[str], where: str) -> str | None:
        if not isinstance(value, dict):
            return None
        missing = [name for name in names if name not in value]
        return f"{where or 'top level'}: {missing[0]!r} is missing" if missing else None

    def _properties(self, value: Any, schemas: Mapping[str, Any], where: str) -> str | None:
        if not isinstance(value, dict):
            return None
        for name, schema in schemas.items():
            if name in value and (found := self.check(value[name], schema, _under(where, name))):
                return found
        return None

    def additional(self, value: Any, schema: Mapping[str, Any], where: str) -> str | None:
        """`additionalProperties`, which depends on the `properties` beside it."""
        if not isinstance(value, dict):
            return None
        rule = schema["additionalProperties"]
        for name in value:
            if name in schema.get("properties", {}):
                continue
            if rule is False:
                return f"{where or 'top level'}: unknown key {_brief(name)}"
            if isinstance(rule, Mapping) and (
                found := self.check(value[name], rule, _under(where, name))
            ):
                return found
        return None

    def _items(self, value: Any, schema: Mapping[str, Any], where: str) -> str | None:
        if not isinstance(value, list):
            return None
        for index, item in enumerate(value):
            if found := self.check(item, schema, f"{where}[{index}]"):
                return found
        return None

    def _pattern(self, value: Any, pattern: str, where: str) -> str | None:
        if not isinstance(value, str) or re.search(pattern, value):
            return None
        return f"{where}: {_brief(value)} does not have the form {pattern}"

    def _minimum(self, value: Any, least: float, where: str) -> str | None:
        if isinstance(value, bool) or not isinstance(value, (int, float)) or value >= least:
            return None
        return f"{where}: {_brief(value)} is below {least}"

    def _minLength(self, value: Any, least: int, where: str) -> str | None:
        short = isinstance(value, str) and len(value) < least
        return f"{where}: shorter than {least} characters" if short else None

    def _maxLength(self, value: Any, most: int, where: str) -> str | None:
        long = isinstance(value, str) and len(value) > most
        return f"{where}: longer than {most} characters" if long else None

    def _maxItems(self, value: Any, most: int, where: str) -> str | None:
        long = isinstance(value, list) and len(value) > most
        return f"{where}: more than {most} entries" if long else None

    def _anyOf(self, value: Any, schemas: list[Mapping[str, Any]], where: str) -> str | None:
        found = [self.check(value, schema, where) for schema in schemas]
        return None if None in found else found[0]


def _is(value: Any, name: str) -> bool:
    if isinstance(value, bool):
        return name == "boolean"
    if name == "integer" and isinstance(value, float):
        return value.is_integer()
    return isinstance(value, _TYPES[name])


def _same(value: Any, wanted: Any) -> bool:
    return isinstance(value, bool) == isinstance(wanted, bool) and bool(value == wanted)


def _kind(value: Any) -> str:
    return next(name for name in _TYPES if name != "integer" and _is(value, name))


def _brief(value: Any) -> str:
    text = ascii(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _under(where: str, name: str) -> str:
    safe = name if re.fullmatch(r"[\w.+-]{1,60}", name, re.ASCII) else _brief(name)
    return f"{where}.{safe}" if where else safe
