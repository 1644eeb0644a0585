"""Values survive fp32 bit for bit and bf16 to its precision; any other number of bytes is refused."""

from __future__ import annotations

import struct

import pytest
import torch

from training.wire import decode_values, encode_values


def test_fp32_is_raw_little_endian_and_exact() -> None:
    values = torch.tensor([1.0, -2.5, 3e-40])
    data = encode_values(values, "fp32")
    assert data == struct.pack("<3f", 1.0, -2.5, values[2].item())
    assert torch.equal(decode_values(data, 3, "fp32"), values)


def test_bf16_rounds_to_nearest_even_in_two_bytes() -> None:
    values = torch.randn(1000, generator=torch.Generator().manual_seed(0))
    data = encode_values(values, "bf16")
    assert len(data) == 2000
    assert torch.equal(decode_values(data, 1000, "bf16"), values.bfloat16().float())


def test_decoded_values_are_not_a_view_of_the_bytes() -> None:
    data = bytearray(encode_values(torch.ones(4), "fp32"))
    values = decode_values(bytes(data), 4, "fp32")
    values.zero_()
    assert bytes(data) == encode_values(torch.ones(4), "fp32")


@pytest.mark.parametrize("wire", ["fp32", "bf16"])
@pytest.mark.parametrize("length", [0, 7, 9, 17])
def test_any_other_length_is_refused(wire: str, length: int) -> None:
    with pytest.raises(ValueError, match="expected"):
        decode_values(bytes(length), 4, wire)
