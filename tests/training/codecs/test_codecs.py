"""Every codec comes back to what it promises, for any values, and takes nothing that no encoder makes."""

from __future__ import annotations

import struct

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given
from torch import Tensor

from training.codecs.blocks import E3M0, Int8
from training.codecs.codec import Codec, NotFinite
from training.codecs.masked import Masked
from training.codecs.plain import BF16, FP32
from training.codecs.sparse import BLOCK, TopK

CODECS: list[Codec] = [
    FP32,
    BF16,
    Int8(),
    Int8(block=64),
    E3M0(),
    E3M0(block=32),
    TopK(),
    TopK(one_in=8),
    Masked(),
    Masked(one_in=4, inner=Int8()),
]
COUNTS = [0, 1, 2, 15, 16, 17, 255, 257, 1023, 1025, BLOCK - 1, BLOCK, BLOCK + 1, 3 * BLOCK + 77]

every_codec = pytest.mark.parametrize("codec", CODECS, ids=repr)


def some(count: int, seed: int = 0, scale: float = 1.0) -> Tensor:
    return torch.randn(count, generator=torch.Generator().manual_seed(seed)) * scale


@st.composite
def values(draw: st.DrawFn) -> Tensor:
    """Of any size that an update may have, the smallest and the largest floats among them."""
    count = draw(st.sampled_from(COUNTS[1:]))
    scale = draw(st.sampled_from([1e-44, 1e-30, 1e-3, 1.0, 1e30, 3e37]))
    flat = some(count, draw(st.integers(0, 1000)), scale)
    flat[draw(st.integers(0, count - 1))] = draw(st.floats(-1.0, 1.0, width=32)) * scale
    flat[: draw(st.integers(0, count))] *= draw(st.sampled_from([0.0, 1e-3, 1.0]))
    return flat


@every_codec
@pytest.mark.parametrize("count", COUNTS)
def test_the_size_follows_from_the_number_of_values_alone(codec: Codec, count: int) -> None:
    for flat in (torch.zeros(count), some(count), some(count, scale=1e-40)):
        data = codec.encode(flat, 7)
        assert len(data) == codec.size_bytes(count)
        back = codec.decode(data, count, 7)
        assert back.shape == (count,)
        assert back.dtype == torch.float32


@every_codec
@given(flat=values())
def test_what_comes_back_is_sent_again_as_the_same(codec: Codec, flat: Tensor) -> None:
    """Whoever passes on what it decoded changes nothing: the forms have one reading, and it is a fixed point."""
    back = codec.decode(codec.encode(flat, 3), len(flat), 3)
    assert torch.isfinite(back).all()
    again = codec.decode(codec.encode(back, 3), len(flat), 3)
    torch.testing.assert_close(again, back, rtol=3e-7, atol=1e-38)


@given(flat=values())
def test_fp32_is_exact_and_little_endian(flat: Tensor) -> None:
    data = FP32.encode(flat)
    assert data == struct.pack(f"<{len(flat)}f", *flat.tolist())
    assert torch.equal(FP32.decode(data, len(flat)), flat)


@given(flat=values())
def test_bf16_rounds_to_nearest_even(flat: Tensor) -> None:
    assert torch.equal(BF16.decode(BF16.encode(flat), len(flat)), flat.bfloat16().float())


@given(flat=values(), block=st.sampled_from([64, 1024]))
def test_int8_is_off_by_half_a_step_at_most(flat: Tensor, block: int) -> None:
    codec = Int8(block)
    back = codec.decode(codec.encode(flat), len(flat))
    for part, came in zip(flat.split(block), back.split(block), strict=True):
        assert (part - came).abs().max() <= part.abs().max() / 254 * (1 + 1e-5) + 1e-36


@given(flat=values(), block=st.sampled_from([32, 256]))
def test_e3m0_is_off_by_a_third_at_most_or_next_to_nothing(flat: Tensor, block: int) -> None:
    codec = E3M0(block)
    back = codec.decode(codec.encode(flat), len(flat))
    for part, came in zip(flat.split(block), back.split(block), strict=True):
        largest = part.abs().max()
        bound = torch.maximum(part.abs() / 3, largest / 64 * 0.75) * (1 + 1e-5) + 1e-36
        assert ((part - came).abs() <= bound).all()
        assert (part * came >= 0).all(), "no sign changes"


def test_e3m0_sends_its_own_levels_exactly() -> None:
    levels = [sign * 2.0**-power for power in range(7) for sign in (1, -1)] + [0.0]
    flat = torch.tensor(levels) * 0.3
    assert torch.equal(E3M0().decode(E3M0().encode(flat), len(flat)), flat)


@pytest.mark.parametrize(
    ("value", "becomes"),
    [(0.75, 1.0), (0.7499999, 0.5), (0.375, 0.5), (0.3749999, 0.25), (0.0117188, 1 / 64), (0.0117187, 0.0)],
)
def test_e3m0_rounds_up_from_half_way(value: float, becomes: float) -> None:
    back = E3M0().decode(E3M0().encode(torch.tensor([1.0, value, -value])), 3)
    assert back.tolist() == [1.0, becomes, -becomes]


@given(flat=values(), one_in=st.sampled_from([8, 64]))
def test_top_k_keeps_the_largest_of_each_block(flat: Tensor, one_in: int) -> None:
    codec = TopK(one_in)
    back = codec.decode(codec.encode(flat), len(flat))
    for part, came in zip(flat.split(BLOCK), back.split(BLOCK), strict=True):
        kept = -(-len(part) // one_in)
        places = sorted(range(len(part)), key=lambda place: (-part[place].abs().item(), place))[:kept]
        left_out = torch.ones(len(part), dtype=torch.bool)
        left_out[places] = False
        assert not came[left_out].any()
        assert ((came - part)[places].abs() <= part.abs().max() / 14 * (1 + 1e-5) + 1e-36).all()


def test_of_equal_values_top_k_keeps_the_first() -> None:
    flat = torch.ones(BLOCK)
    flat[::2] = -1.0
    back = TopK(64).decode(TopK(64).encode(flat), BLOCK)
    assert back.nonzero().flatten().tolist() == list(range(64))
    assert torch.equal(back[:64], flat[:64])


def test_places_at_both_ends_of_a_block_survive() -> None:
    flat = torch.zeros(2 * BLOCK)
    flat[[0, BLOCK - 1, BLOCK, 2 * BLOCK - 1]] = torch.tensor([1.0, -2.0, 3.0, -4.0])
    back = TopK(BLOCK // 2).decode(TopK(BLOCK // 2).encode(flat), 2 * BLOCK)
    torch.testing.assert_close(back, flat, rtol=1 / 7, atol=0)


def test_who_uses_one_key_keeps_the_same_values() -> None:
    """So that a mean of what they sent loses nothing when it is sent on."""
    codec, count = Masked(one_in=16, inner=FP32), 5000
    mine, yours = (codec.decode(codec.encode(some(count, seed), 42), count, 42) for seed in (1, 2))
    assert torch.equal(mine != 0, yours != 0)
    mean = (mine + yours) / 2
    assert torch.equal(codec.decode(codec.encode(mean, 42), count, 42), mean)
    other = codec.decode(codec.encode(some(count, 1), 43), count, 43)
    assert not torch.equal(mine != 0, other != 0)


def test_every_value_has_its_turn_in_a_mask() -> None:
    codec, count, keys = Masked(one_in=16), 1600, 4000
    times = torch.zeros(count)
    for key in range(keys):
        times += codec.decode(codec.encode(torch.ones(count), key), count, key)
    share = times / keys
    # 1600 values, each within five standard deviations of 1/16.
    assert (share - 1 / 16).abs().max() < 5 * (1 / 16 * 15 / 16 / keys) ** 0.5


@pytest.mark.parametrize("codec", [Int8(), E3M0(), TopK()], ids=repr)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("place", [0, BLOCK + 4])
def test_what_is_not_finite_has_no_form_in_few_bits(codec: Codec, value: float, place: int) -> None:
    flat = some(BLOCK + 5)
    flat[place] = value
    with pytest.raises(NotFinite):
        codec.encode(flat)


@pytest.mark.parametrize("codec", [FP32, BF16, Masked(one_in=1)], ids=repr)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), 3.4e38])
def test_and_where_it_has_one_nobody_takes_it(codec: Codec, value: float) -> None:
    """3.4e38 is infinite in bf16, and finite in fp32."""
    data = codec.encode(torch.tensor([1.0, value]))
    if codec is FP32 and value == 3.4e38:
        assert codec.decode(data, 2).isfinite().all()
        return
    with pytest.raises(NotFinite):
        codec.decode(data, 2)


@every_codec
@pytest.mark.parametrize("count", [1, 17, BLOCK + 1])
def test_any_other_length_is_refused(codec: Codec, count: int) -> None:
    data = codec.encode(some(count))
    for other in (b"", data[:-1], data + b"\0", data * 2):
        with pytest.raises(ValueError, match="expected"):
            codec.decode(other, count)


@every_codec
@given(data=st.data())
def test_any_bytes_are_refused_or_come_to_finite_values(codec: Codec, data: st.DataObject) -> None:
    count = data.draw(st.sampled_from([1, 17, 300]))
    size = codec.size_bytes(count)
    packed = data.draw(st.binary(min_size=size, max_size=size))
    try:
        back = codec.decode(packed, count)
    except ValueError:
        return
    assert back.shape == (count,)
    assert torch.isfinite(back).all()


@pytest.mark.parametrize(
    ("codec", "data", "count"),
    [
        (FP32, struct.pack("<f", float("nan")), 1),
        (BF16, b"\x80\x7f", 1),
        (Int8(), struct.pack("<fb", -1.0, 1), 1),
        (Int8(), struct.pack("<fb", 3e38, 1), 1),
        (Int8(), struct.pack("<fb", 1.0, -128), 1),
        (E3M0(), struct.pack("<fB", float("inf"), 1), 1),
        (E3M0(), struct.pack("<fB", float("nan"), 1), 1),
        (TopK(2), struct.pack("<fHH", 1.0, 2, 1), 4),
        (TopK(2), struct.pack("<fHH", 1.0, 1, 1), 4),
        (TopK(2), struct.pack("<fHH", 1.0, 0, 4), 4),
        (TopK(2), struct.pack("<fHH", 3e38, 0, 1), 4),
    ],
)
def test_what_no_encoder_makes_is_refused(codec: Codec, data: bytes, count: int) -> None:
    with pytest.raises(ValueError):
        codec.decode(data, count)


@every_codec
def test_decoded_values_are_nobodys_memory(codec: Codec) -> None:
    data = bytearray(codec.encode(torch.ones(40)))
    before = bytes(data)
    codec.decode(data, 40).add_(1)
    assert bytes(data) == before


def test_zeros_stay_zeros() -> None:
    for codec in CODECS:
        assert not codec.decode(codec.encode(torch.zeros(5000)), 5000).any()
