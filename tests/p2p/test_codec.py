"""Any bytes decode to exactly the message that encodes to them, or are refused."""

from __future__ import annotations

import struct
from typing import Annotated, Any

import cbor2
import msgspec
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from msgspec import Meta

from p2p.codec import DEPTH_MAX, WireMessage, _is_in_wire_order, decode, encode
from p2p.errors import MalformedMessage

BYTES_MAX = 4096


class Point(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag=True):
    count: Annotated[int, Meta(ge=0, le=2**53)]
    ratio: Annotated[float, Meta(ge=0, le=1e9)] = 0.0
    name: Annotated[str, Meta(max_length=16)] = ""
    blob: Annotated[bytes, Meta(max_length=64)] = b""
    more: Annotated[list[int], Meta(max_length=8)] = []
    flag: bool = False
    maybe: bytes | None = None


class Other(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag=True):
    points: list[Point]


class Leaf(WireMessage, frozen=True):
    zeta: bytes
    a_long_name: int
    mid: str | None
    on: bool


class Tree(WireMessage, frozen=True):
    trees: list[Leaf]
    any: Leaf | None
    no: int


class Weighed(WireMessage, frozen=True):
    weight: float
    leaf: Leaf


LEAVES = st.builds(
    Leaf,
    zeta=st.binary(max_size=300),
    a_long_name=st.integers(-(2**63), 2**64 - 1),
    mid=st.none() | st.text(),
    on=st.booleans(),
)
TREES = st.builds(Tree, trees=st.lists(LEAVES, max_size=3), any=st.none() | LEAVES, no=st.integers(0, 1000))
WEIGHED = st.builds(Weighed, weight=st.floats(allow_nan=False, allow_infinity=False), leaf=LEAVES)
POINTS = st.builds(
    Point,
    count=st.integers(0, 2**53),
    ratio=st.floats(0, 1e9, allow_nan=False),
    name=st.text(max_size=16),
    blob=st.binary(max_size=64),
    more=st.lists(st.integers(-(2**63), 2**63 - 1), max_size=8),
    flag=st.booleans(),
    maybe=st.none() | st.binary(max_size=64),
)
PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text() | st.binary(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text() | st.integers(), inner),
    max_leaves=20,
)


def plain(**changes: object) -> dict[str, Any]:
    return {"type": "Point", **msgspec.to_builtins(Point(count=1), builtin_types=(bytes,)), **changes}


def test_the_template_of_this_file_is_a_message() -> None:
    assert decode(cbor2.dumps(plain(), canonical=True), Point, bytes_max=BYTES_MAX) == Point(count=1)


@given(POINTS)
def test_what_is_encoded_decodes_to_itself(point: Point) -> None:
    assert decode(encode(point), Point, bytes_max=BYTES_MAX) == point
    both: Any = decode(encode(Other(points=[point])), Point | Other, bytes_max=BYTES_MAX)  # type: ignore[arg-type]
    assert both == Other(points=[point])


@given(POINTS)
def test_equal_messages_have_equal_bytes(point: Point) -> None:
    assert encode(point) == encode(msgspec.structs.replace(point))


@given(
    st.binary(max_size=200) | PLAIN.map(cbor2.dumps) | PLAIN.map(lambda value: cbor2.dumps(plain(more=value)))
)
@example(b"")
@example(b"\xf7")
@example(b"\x9f" * 1000)
@example(b"\x81" * 1000)
@example(b"\xbb\xff\xff\xff\xff\xff\xff\xff\xff")
@example(b"\x5b\x7f\xff\xff\xff\xff\xff\xff\xff")
def test_any_bytes_are_a_message_or_malformed(data: bytes) -> None:
    try:
        message = decode(data, Point, bytes_max=BYTES_MAX)
    except MalformedMessage:
        return
    assert encode(message) == data


@given(POINTS, st.integers(0, 400), st.integers(0, 255))
def test_a_changed_byte_is_never_the_same_message(point: Point, at: int, value: int) -> None:
    data = encode(point)
    changed = bytearray(data)
    changed[at % len(data)] = value
    try:
        message = decode(bytes(changed), Point, bytes_max=BYTES_MAX)
    except MalformedMessage:
        return
    assert encode(message) == changed


@given(LEAVES | TREES | WEIGHED)
def test_messages_that_need_no_sorting_come_out_as_if_they_had_been_sorted(message: WireMessage) -> None:
    plain = msgspec.to_builtins(message, builtin_types=(bytes,))
    assert encode(message) == cbor2.dumps(plain, canonical=True)
    assert decode(encode(message), type(message), bytes_max=BYTES_MAX) == message


def test_what_needs_no_sorting() -> None:
    assert [_is_in_wire_order(kind) for kind in (Leaf, Tree, Weighed, Point, Other)] == [
        True,
        True,
        *[False] * 3,
    ]
    assert Tree.__struct_fields__ == ("no", "any", "trees")


MAP_END = b"\xff"
CANONICAL = cbor2.dumps(plain(), canonical=True)
REFUSED = {
    "trailing bytes": CANONICAL + b"\x00",
    "truncated": CANONICAL[:-1],
    "unsorted keys": cbor2.dumps(dict(sorted(plain().items(), reverse=True))),
    "indefinite map": b"\xbf" + CANONICAL[1:] + MAP_END,
    "indefinite bytes": cbor2.dumps(plain(), canonical=True).replace(b"dblob\x40", b"dblob\x5f\x40\xff"),
    "duplicate key": bytes([CANONICAL[0] + 1]) + CANONICAL[1:] + b"dflag\xf4",
    "wide integer": CANONICAL.replace(b"ecount\x01", b"ecount\x18\x01"),
    "integral float for an integer": cbor2.dumps(plain(count=1.0), canonical=True),
    "wide float": CANONICAL.replace(b"eratio\xf9\x00\x00", b"eratio\xfb" + struct.pack(">d", 0.0)),
    "not a number": cbor2.dumps(plain(ratio=float("nan")), canonical=True),
    "infinity": cbor2.dumps(plain(ratio=float("inf")), canonical=True),
    "unknown field": cbor2.dumps(plain(extra=1), canonical=True),
    "default left out": cbor2.dumps({"type": "Point", "count": 1}, canonical=True),
    "wrong type": cbor2.dumps(plain(type="Other"), canonical=True),
    "below its bound": cbor2.dumps(plain(count=-1), canonical=True),
    "above its bound": cbor2.dumps(plain(count=2**53 + 1), canonical=True),
    "too long": cbor2.dumps(plain(name="x" * 17), canonical=True),
    "undefined": CANONICAL.replace(b"emaybe\xf6", b"emaybe\xf7"),
    "text that is not utf-8": CANONICAL.replace(b"dname\x60", b"dname\x61\xff"),
    "a list": cbor2.dumps([1]),
    "bignum": cbor2.dumps(plain(count=2**80), canonical=True),
    "date tag": CANONICAL.replace(b"ecount\x01", b"ecount\xc1\x01"),
    "decimal tag": CANONICAL.replace(b"ecount\x01", b"ecount\xc4\x82\x01\x01"),
    "shared value tag": CANONICAL.replace(b"dmore\x80", b"dmore\xd8\x1c\x81\xd8\x1d\x00"),
    "regular expression tag": CANONICAL.replace(b"dname\x60", b"dname\xd8\x23\x62.*"),
    "self-describing tag": b"\xd9\xd9\xf7" + CANONICAL,
    "unknown tag": b"\xd9\x27\x0f" + CANONICAL,
}


@pytest.mark.parametrize("data", REFUSED.values(), ids=REFUSED.keys())
def test_every_other_form_is_refused(data: bytes) -> None:
    assert data != CANONICAL
    with pytest.raises(MalformedMessage):
        decode(data, Point, bytes_max=BYTES_MAX)


def test_size_and_depth_are_bounded() -> None:
    with pytest.raises(MalformedMessage, match="the limit is 10"):
        decode(CANONICAL, Point, bytes_max=10)
    nested: Any = 1
    for _ in range(DEPTH_MAX + 1):
        nested = [nested]
    with pytest.raises(MalformedMessage):
        decode(cbor2.dumps(plain(more=nested), canonical=True), Point, bytes_max=BYTES_MAX)


def test_a_refusal_names_what_was_expected_and_no_module() -> None:
    with pytest.raises(MalformedMessage, match=r"^not a Point: "):
        decode(b"\x01", Point, bytes_max=BYTES_MAX)
    with pytest.raises(MalformedMessage, match=r"^not a Point or Other: "):
        decode(b"\x01", Point | Other, bytes_max=BYTES_MAX)  # type: ignore[arg-type]
