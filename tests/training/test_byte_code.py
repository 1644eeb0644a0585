"""The byte of a record: what it stands for, how far it is off, and by how much it moves a parameter."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from training.byte_code import SIZES, coefficient, decode, encode, rate_units

CLIP = 10.0


def test_the_table_is_that_of_the_protocol() -> None:
    """Each size is the sixteenth root, rounded to the nearest: checked in whole numbers, as are the known answers."""
    for q, size in enumerate(SIZES["log"]):
        if q:
            power = 1 << (30 * 16 + q - 127)
            assert (2 * size - 1) ** 16 <= power << 16 <= (2 * size + 1) ** 16
    assert [SIZES["log"][q] for q in (0, 1, 2, 126, 127)] == [0, 4573921, 4776426, 1028218693, 1 << 30]
    assert SIZES["sign"] == (0, *[1 << 30] * 127)


@given(st.floats(-CLIP, CLIP))
def test_a_byte_is_at_most_2_2_percent_off(gradient: float) -> None:
    read = decode(encode(gradient, CLIP), CLIP)
    if abs(gradient) > CLIP * 2 ** (-126 / 16):
        assert abs(read / gradient - 1) < 0.022
    else:
        assert abs(read) <= 2 * abs(gradient)
        assert abs(read) <= CLIP * 2 ** (-126 / 16)


@pytest.mark.parametrize(
    ("gradient", "byte"),
    [
        (0.0, 0),
        (-0.0, 0),
        (math.nan, 0),
        (CLIP, 127),
        (-CLIP, 255),
        (math.inf, 127),
        (-math.inf, 255),
        (CLIP / 2, 111),
        (-CLIP / 256 * 2 ** (1 / 8), 128 + 1),
        (CLIP / 512, 0),
    ],
)
def test_bytes_of_the_protocol(gradient: float, byte: int) -> None:
    assert encode(gradient, CLIP) == byte


@pytest.mark.parametrize("byte", range(256))
def test_decoding_and_encoding_agree(byte: int) -> None:
    again = encode(decode(byte, CLIP), CLIP)
    assert again == (0 if byte == 0x80 else byte)


def test_signs_alone() -> None:
    assert [encode(gradient, CLIP, "sign") for gradient in (0.001, -0.001, 0.0, math.nan)] == [127, 255, 0, 0]
    assert decode(1, CLIP, "sign") == decode(127, CLIP, "sign") == CLIP


@given(st.integers(0, 255), st.floats(1e-8, 1.0), st.integers(0, 62))
def test_a_parameter_moves_against_the_gradient_by_the_rate_times_its_size(
    byte: int, step_size: float, exponent: int
) -> None:
    moved = coefficient(byte, rate_units(step_size, CLIP), exponent)
    expected = -step_size * decode(byte, CLIP) * 2.0**exponent
    assert moved == pytest.approx(expected, rel=1e-6, abs=0.5 + 1e-6)
    assert coefficient(byte ^ 0x80, rate_units(step_size, CLIP), exponent) == -moved


def test_known_coefficients() -> None:
    rate = rate_units(1e-4, CLIP)
    assert rate == 18446744073709552
    assert [coefficient(byte, rate, 28) for byte in (0, 1, 127, 128, 255)] == [0, -1143, -268435, 0, 268435]
