"""Messages to canonical CBOR bytes and back, safe against any input.

Owns the one way messages become bytes. A message is a frozen msgspec struct; its wire form is the canonical
CBOR of its builtin form (RFC 8949 section 4.2.3: shortest integers, sorted keys, definite lengths). ``decode``
accepts exactly the bytes that ``encode`` would have produced for some value of the type, and nothing else: no
tags, no indefinite lengths, no duplicate keys, no trailing bytes, no NaN.

Sorting keys is most of the work of a canonical encoder. A ``WireMessage`` keeps its fields in the order of their keys
from the beginning, so that nothing is left to sort.

Relies on: cbor2 for parsing, msgspec for types and ``Meta`` bounds.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable
from typing import Any, NoReturn, TypeVar, get_args

import cbor2
import msgspec
from msgspec import inspect

from p2p.errors import MalformedMessage

DEPTH_MAX = 8
"""Nesting allowed in any message."""

T = TypeVar("T")


def _sorted(keys: Iterable[str]) -> list[str]:
    """Keys in canonical order: by the length of their bytes, then bytewise."""
    return sorted(keys, key=lambda key: (len(key.encode()), key.encode()))


class _InWireOrder(msgspec.StructMeta):
    """Sorts the fields of a struct by their keys, whatever order they are written in."""

    def __new__(mcls, name: str, bases: tuple[type, ...], namespace: dict[str, Any], **options: Any) -> Any:
        annotations = namespace.get("__annotations__", {})
        namespace["__annotations__"] = {key: annotations[key] for key in _sorted(annotations)}
        return super().__new__(mcls, name, bases, namespace, **options)


class WireMessage(
    msgspec.Struct,
    frozen=True,
    kw_only=True,
    forbid_unknown_fields=True,
    tag=True,
    tag_field="t",
    metaclass=_InWireOrder,
):
    """Base of all that peers say: immutable, named fields, and under ``t`` its name, so that unions can be decoded."""


def encode(message: msgspec.Struct) -> bytes:
    """The canonical CBOR bytes of ``message``."""
    plain = msgspec.to_builtins(message, builtin_types=(bytes,))
    return cbor2.dumps(plain, canonical=not _is_in_wire_order(type(message)))


@functools.cache
def _is_in_wire_order(message_type: type[msgspec.Struct]) -> bool:
    """Whether values of this type are canonical as they come: keys sorted, and no float that could be shorter."""
    return _comes_canonical(inspect.type_info(message_type))


def _comes_canonical(kind: inspect.Type) -> bool:
    match kind:
        case inspect.StructType():
            config = kind.cls.__struct_config__
            keys = [field.encode_name for field in kind.fields]
            if config.tag_field is not None:
                keys.insert(0, config.tag_field)
            return keys == _sorted(keys) and all(_comes_canonical(field.type) for field in kind.fields)
        case inspect.UnionType():
            return all(_comes_canonical(one) for one in kind.types)
        case inspect.ListType():
            return _comes_canonical(kind.item_type)
        case _:
            return isinstance(
                kind,
                inspect.IntType | inspect.StrType | inspect.BytesType | inspect.BoolType | inspect.NoneType,
            )


def decode(data: bytes, message_type: type[T], *, bytes_max: int) -> T:
    """The message that ``data`` canonically encodes.

    ``message_type`` is a struct or a tagged union of structs. Raises MalformedMessage for anything else than
    the canonical encoding of one value of that type within ``bytes_max`` bytes.
    """
    if len(data) > bytes_max:
        raise MalformedMessage(f"message of {len(data)} bytes, the limit is {bytes_max}")
    try:
        plain = cbor2.loads(
            data,
            max_depth=DEPTH_MAX,
            allow_indefinite=False,
            allow_duplicate_keys=False,
            tag_hook=_refuse_tag,
            semantic_decoders=_NO_TAGS,
        )
        message = msgspec.convert(plain, message_type)
    except MalformedMessage:
        raise
    except (
        cbor2.CBORError,
        msgspec.ValidationError,
        ValueError,
        TypeError,
        RecursionError,
        OverflowError,
    ) as error:
        raise MalformedMessage(f"not a {_name(message_type)}: {error}") from error
    if (_NAN in data or _INFINITY in data or _MINUS_INFINITY in data) and not _finite(plain):
        raise MalformedMessage(f"a {_name(message_type)} with a number that is not finite")
    # Re-encoding is the whole canonical check: trailing bytes, wide integers, unsorted keys and unknown
    # fields all come back as different bytes.
    if encode(message) != data:  # type: ignore[arg-type]
        raise MalformedMessage(f"a {_name(message_type)} in a non-canonical form")
    return message


# The canonical encodings of what is not finite. Where none of them occurs, no number need be looked at.
_NAN, _INFINITY, _MINUS_INFINITY = b"\xf9\x7e\x00", b"\xf9\x7c\x00", b"\xf9\xfc\x00"


def _refuse_tag(*_: object) -> NoReturn:
    raise MalformedMessage("a CBOR tag, which no message uses")


# Every tag cbor2 would otherwise turn into an object: dates, bignums, decimals, shared references, regular
# expressions, sets, addresses. Tags it does not know go to ``tag_hook``.
_NO_TAGS = dict.fromkeys(
    (0, 1, 2, 3, 4, 5, 25, 28, 29, 30, 35, 36, 37, 52, 54, 100, 256, 258, 260, 261, 1004, 43000, 55799),
    _refuse_tag,
)


def _finite(plain: Any) -> bool:
    if isinstance(plain, float):
        return math.isfinite(plain)
    if isinstance(plain, dict):
        return all(_finite(value) for value in plain.values())
    if isinstance(plain, list):
        return all(_finite(value) for value in plain)
    return True


def _name(message_type: Any) -> str:
    return " or ".join(kind.__name__ for kind in get_args(message_type) or (message_type,))
