"""What people are told about values that do not fit a schema: nested, in lists, and of several kinds."""

from typing import Annotated, Any, Literal

import msgspec
import pytest
from msgspec import Meta

from p2p.schema import explain, nearest, with_default_kinds


class _Struct(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    pass


class Cat(_Struct, frozen=True, kw_only=True, tag_field="kind", tag="cat"):
    lives: Annotated[int, Meta(ge=1, le=9)] = 9


class Dog(_Struct, frozen=True, kw_only=True, tag_field="kind", tag="dog"):
    name: str
    barks: float | Annotated[tuple[float, ...], Meta(min_length=2, max_length=2)] = 1.0


class House(_Struct, frozen=True, kw_only=True):
    pet: Cat | Dog = Cat()
    colour: Literal["white", "blue"] = "white"
    area_m2: Annotated[float, Meta(gt=0, le=1e6)] = 50.0
    rooms: Annotated[int, Meta(ge=1, le=9)] = 2
    cellars: Annotated[int, Meta(ge=0, le=9)] = 0

    def __post_init__(self) -> None:
        if self.cellars > self.rooms:
            raise ValueError("more cellars than rooms")


class Street(_Struct, frozen=True, kw_only=True):
    name: Annotated[str, Meta(pattern="^[a-z]+$")]
    first: House = House()
    house: tuple[House, ...] = ()
    guests: tuple[Cat | Dog, ...] = ()
    open: bool = True


def told(data: dict[str, Any]) -> str:
    with pytest.raises(msgspec.ValidationError) as caught:
        msgspec.convert(data, Street)
    found = explain(caught.value, data, Street)
    return f"{found.what} | {found.why} | {found.fix}"


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        ({"name": "a", "opne": True}, "there is no key opne | the file has the keys name, first, house, guests, open"),
        ({"name": "a", "opne": True}, "did you mean open?"),
        ({"name": "a", "rooms": 3}, "did you mean first.rooms?"),
        ({"name": "a", "xyz": 3}, "remove the key"),
        ({"name": "a", "first": {"room": 3}}, "there is no key first.room | [first] has the keys pet, colour,"),
        ({"name": "a", "first": {"room": 3}}, "did you mean rooms?"),
        ({}, "name is missing | it has no default | set it to text that matches ^[a-z]+$"),
        ({"name": "A"}, 'name = "A" is not allowed | name must be text that matches ^[a-z]+$ | correct name'),
        ({"name": "a", "open": 1}, "open = 1 is not allowed | open must be true or false"),
        ({"name": "a", "first": {"rooms": 2.5}}, "first.rooms must be a whole number from 1 to 9"),
        ({"name": "a", "house": [{}, {"area_m2": 0}]}, "house[1].area_m2 = 0 is not allowed | house[1]"),
        ({"name": "a", "house": [{}, {"area_m2": 0}]}, "a number above 0 to 1,000,000"),
        ({"name": "a", "house": 3}, "house must be a list, each a section with the keys pet, colour"),
        ({"name": "a", "first": {"colour": "whit"}}, 'one of "blue", "white" | did you mean white?'),
        ({"name": "a", "first": {"cellars": 5}}, "[first]: more cellars than rooms | these values"),
        ({"name": "a", "guests": [{}]}, 'guests[0].kind is missing | it has no default | set it to one of "cat"'),
        ({"name": "a", "guests": [{"kind": "cot"}]}, 'guests[0].kind must be one of "cat", "dog" | did you mean cat?'),
        ({"name": "a", "guests": [{"kind": "dog"}]}, "guests[0].name is missing"),
        ({"name": "a", "guests": [{"kind": "cat", "barks": 1}]}, "[guests[0]] has the keys kind, lives"),
        ({"name": "a", "guests": [{"kind": "cat"}, {"kind": "cat", "lives": 10}]}, "guests[1].lives = 10 is not"),
        ({"name": "a", "guests": [{"kind": "dog", "name": "b", "barks": [1]}]}, "a number or a list of 2, each a"),
        ({"name": "a", "guests": ["cat"]}, 'guests[0] = "cat" is not allowed'),
        ({"name": "a", "first": {"pet": {"kind": "cat", "lives": 0}}}, "first.pet.lives must be a whole number"),
    ],
)  # fmt: skip
def test_what_is_told(data: dict[str, Any], expected: str) -> None:
    assert expected in told(data)


def test_the_whole_being_something_else_is_told() -> None:
    with pytest.raises(msgspec.ValidationError) as caught:
        msgspec.convert([], Street)
    assert explain(caught.value, [], Street).what == "Expected `object`, got `array`"


def test_long_values_are_shortened() -> None:
    assert len(told({"name": "A" * 1000})) < 200


def test_a_section_of_several_kinds_is_of_the_default_one_where_it_does_not_say() -> None:
    data = {"name": "a", "first": {"pet": {"lives": 3}}}
    street = msgspec.convert(with_default_kinds(data, Street), Street)
    assert street.first.pet == Cat(lives=3)
    assert data == {"name": "a", "first": {"pet": {"lives": 3}}}
    other = {"name": "a", "first": {"pet": {"kind": "dog", "name": "rex"}}}
    assert with_default_kinds(other, Street) == other


def test_nearest() -> None:
    assert nearest("churm", ["ideal", "churn"]) == "churn"
    assert nearest("xyz", ["ideal", "churn"]) == ""
