"""The codecs by the names that a run spec gives them."""

from __future__ import annotations

from training.codecs.blocks import E3M0, Int8
from training.codecs.codec import Codec
from training.codecs.plain import BF16, FP32
from training.codecs.sparse import TopK
from training.spec_sections import UpdateWire, Wire

WIRES: dict[Wire, Codec] = {"fp32": FP32, "bf16": BF16, "int8": Int8()}
"""Forms for weights themselves, of which no value may be left out."""

UPDATE_WIRES: dict[UpdateWire, Codec] = {
    "fp32": FP32,
    "bf16": BF16,
    "int8": Int8(),
    "e3m0": E3M0(),
    "top64": TopK(one_in=64),
}
"""Forms for differences, of which what is left out now is sent later."""
