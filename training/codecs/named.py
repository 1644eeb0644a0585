"""The codecs by the names that a run spec gives them."""

from __future__ import annotations

from training.codecs.blocks import Int8
from training.codecs.codec import Codec
from training.codecs.plain import BF16, FP32
from training.spec_sections import Wire

WIRES: dict[Wire, Codec] = {"fp32": FP32, "bf16": BF16, "int8": Int8()}
"""Forms for weights themselves, of which no value may be left out."""
