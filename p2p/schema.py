"""What msgspec found wrong with a file, as a person would say it: which key, what it holds, what is allowed or nearest.

Works for every ``msgspec.Struct`` whose keys are all known (``forbid_unknown_fields``): nested ones, lists of them, and
unions of them told apart by a tag. Owns wording only: ``explain`` says what is wrong, the caller with what and raises
its own error.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import msgspec
from msgspec import inspect

Step: TypeAlias = str | int
"""One step down into a file: a key, or a place in a list."""

_AT_PATH = re.compile(r" - at `\$\.?([^`]*)`$")
_STEP = re.compile(r"([^.\[\]]+)|\[(\d+)\]|\[\.\.\.\]")
_UNKNOWN = re.compile(r"unknown field `([^`]*)`")
_MISSING = re.compile(r"missing required field `([^`]*)`")


@dataclass(frozen=True, slots=True)
class Explanation:
    """One finding, as the three parts of an error made to be read."""

    what: str
    why: str
    fix: str


def explain(error: msgspec.ValidationError, data: object, schema: Any) -> Explanation:
    """What ``error`` says about ``data``, which ``msgspec.convert`` could not make a ``schema`` of."""
    message = str(error)
    at = _AT_PATH.search(message)
    path = at.group(1) if at else ""
    reason = message[: at.start()] if at else message
    node, value = _walk(inspect.type_info(schema), data, _steps(path))
    if unknown := _UNKNOWN.search(reason):
        return _unknown_key(unknown.group(1), path, node, schema)
    if missing := _MISSING.search(reason):
        return _missing_key(missing.group(1), path, node)
    if isinstance(node, inspect.StructType) and isinstance(value, dict):  # its own __post_init__ objects
        return Explanation(
            f"{_section(path)}: {reason}", "these values cannot be used together", f"correct {_section(path)}"
        )
    near = nearest(value, _choices(node)) if isinstance(value, str) else ""
    return Explanation(
        f"{path} = {_shown(value)} is not allowed" if path else reason,
        f"{path or 'the file'} must be {_allowed(node)}",
        f"did you mean {near}?" if near else f"correct {path or 'the file'}",
    )


def with_default_kinds(data: dict[str, Any], schema: type[msgspec.Struct]) -> dict[str, Any]:
    """``data`` with the default's tag in every section that comes in several kinds and does not say which it is."""
    filled = dict(data)
    for field in msgspec.structs.fields(schema):
        section = data.get(field.encode_name)
        if not isinstance(section, dict):
            continue
        default = field.default
        if (
            isinstance(default, msgspec.Struct)
            and (config := default.__struct_config__).tag_field is not None
        ):
            section = {config.tag_field: config.tag} | section
        if isinstance(field.type, type) and issubclass(field.type, msgspec.Struct):
            section = with_default_kinds(section, field.type)
        filled[field.encode_name] = section
    return filled


def nearest(name: str, known: Sequence[str]) -> str:
    """The one of ``known`` that ``name`` was probably meant to be, or nothing."""
    return next(iter(difflib.get_close_matches(name, known, n=1)), "")


def _unknown_key(key: str, path: str, node: inspect.Type | None, schema: Any) -> Explanation:
    known = _keys(node)
    near = nearest(key, known)
    elsewhere = [found for found in _paths(inspect.type_info(schema)) if found.rpartition(".")[2] == key]
    if not near and elsewhere:
        near = " or ".join(elsewhere[:3])
    return Explanation(
        f"there is no key {f'{path}.{key}' if path else key}",
        f"{_section(path)} has the keys {', '.join(known)}",
        f"did you mean {near}?" if near else "remove the key",
    )


def _missing_key(key: str, path: str, node: inspect.Type | None) -> Explanation:
    where = f"{path}.{key}" if path else key
    field, _ = _walk(node, {}, (key,))
    return Explanation(f"{where} is missing", "it has no default", f"set it to {_allowed(field)}")


def _steps(path: str) -> tuple[Step | None, ...]:
    """The steps of a path as msgspec writes it; None stands for some value of a table, whose key it does not tell."""
    return tuple(
        found[1] if found[1] else int(found[2]) if found[2] else None for found in _STEP.finditer(path)
    )


def _walk(
    node: inspect.Type | None, value: object, steps: Sequence[Step | None]
) -> tuple[inspect.Type | None, object]:
    """The type and the value at the end of ``steps``; a type of None where the schema says nothing of it."""
    found = node
    for step in steps:
        found = _descend(found, value, step)
        if isinstance(value, dict):
            value = value.get(step)
        elif isinstance(value, list | tuple) and isinstance(step, int) and step < len(value):
            value = value[step]
        else:
            value = None
    if isinstance(found, inspect.UnionType) and (chosen := _chosen(found, value)):
        found = chosen
    return found, value


def _descend(node: inspect.Type | None, value: object, step: Step | None) -> inspect.Type | None:
    match node:
        case inspect.UnionType(types=types):
            if chosen := _chosen(node, value):
                return _descend(chosen, value, step)
            structs = [option for option in types if isinstance(option, inspect.StructType)]
            if any(step == option.tag_field for option in structs):
                return inspect.LiteralType(_choices(node))
            inner = (_descend(option, value, step) for option in types)
            return next((found for found in inner if found is not None), None)
        case inspect.StructType(fields=fields):
            return next((field.type for field in fields if field.encode_name == step), None)
        case inspect.VarTupleType(item_type=item) | inspect.ListType(item_type=item):
            return item if isinstance(step, int) else None
        case inspect.DictType(value_type=item):
            return item
    return None


def _chosen(union: inspect.UnionType, value: object) -> inspect.StructType | None:
    """The member of a tagged union that ``value`` says it is."""
    if not isinstance(value, dict):
        return None
    structs = [option for option in union.types if isinstance(option, inspect.StructType)]
    return next((option for option in structs if value.get(option.tag_field) == option.tag), None)


def _keys(node: inspect.Type | None) -> list[str]:
    if not isinstance(node, inspect.StructType):
        return []
    tag = [node.tag_field] if node.tag_field else []
    return tag + [field.encode_name for field in node.fields]


def _choices(node: inspect.Type | None) -> tuple[str, ...]:
    """The words that are allowed, where only some are."""
    match node:
        case inspect.LiteralType(values=values):
            return tuple(str(value) for value in values)
        case inspect.UnionType(types=types):
            return tuple(str(option.tag) for option in types if isinstance(option, inspect.StructType))
    return ()


def _paths(node: inspect.Type | None, prefix: str = "") -> Iterator[str]:
    """Every dotted key of the sections under ``node``; lists are not entered."""
    if isinstance(node, inspect.StructType):
        for field in node.fields:
            yield prefix + field.encode_name
            yield from _paths(field.type, f"{prefix}{field.encode_name}.")


def _allowed(node: inspect.Type | None) -> str:
    """What may be written, in words."""
    match node:
        case inspect.LiteralType(values=values):
            return "one of " + ", ".join(_shown(value) for value in values)
        case inspect.BoolType():
            return "true or false"
        case inspect.IntType():
            return f"a whole number{_range_of(node)}"
        case inspect.FloatType():
            return f"a number{_range_of(node)}"
        case inspect.StrType(pattern=pattern):
            return f"text that matches {pattern}" if pattern else "text"
        case (
            inspect.VarTupleType(item_type=item, min_length=least, max_length=most)
            | inspect.ListType(item_type=item, min_length=least, max_length=most)
        ):
            return f"a list{_count(least, most)}, each {_allowed(item)}"
        case inspect.UnionType(types=types):
            if choices := _choices(node):
                return "a section of the kind " + ", ".join(choices)
            return " or ".join(
                _allowed(option) for option in types if not isinstance(option, inspect.NoneType)
            )
        case inspect.StructType():
            return "a section with the keys " + ", ".join(_keys(node))
        case inspect.DictType():
            return "a section"
    return "what the schema says"


def _range_of(number: inspect.IntType | inspect.FloatType) -> str:
    parts = [
        f" {word} {bound:,.15g}"
        for word, bound in [
            ("from", number.ge),
            ("above", number.gt),
            ("to", number.le),
            ("below", number.lt),
        ]
        if bound is not None
    ]
    return "".join(parts)


def _count(least: int | None, most: int | None) -> str:
    if least and least == most:
        return f" of {least}"
    if most is not None:
        return f" of up to {most}" if not least else f" of {least} to {most}"
    return f" of at least {least}" if least else ""


def _section(path: str) -> str:
    return f"[{path}]" if path else "the file"


def _shown(value: object) -> str:
    """A value as TOML has it, shortened."""
    text = msgspec.json.encode(value, enc_hook=str).decode()
    return text if len(text) <= 60 else text[:57] + "..."
