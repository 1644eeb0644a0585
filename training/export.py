"""Weights as safetensors bytes that any program can load, and back.

Owns the export format: the model's tensors under their own names, and string metadata: what the caller adds, and the
run spec as TOML under ``spec``. Also owns the one place that reads safetensors bytes, which may be anyone's.

Relies on: the safetensors library for the layout of the bytes. Nothing here can run code.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from p2p.errors import GossamerError
from training.layout import ParameterLayout
from training.run_spec import RunSpec, SpecError, parse_run_spec, spec_as_toml

HEADER_BYTES_MAX = 16 << 20

ExportType = Literal["fp32", "bf16", "fp16"]
_DTYPES: dict[ExportType, torch.dtype] = {
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
}


class ExportError(GossamerError):
    """A file that is not an exported model of the expected shape."""


@dataclass(frozen=True, slots=True, eq=False)
class Exported:
    """An exported model read back: flat fp32 ``values`` in layout order."""

    spec: RunSpec
    values: Tensor
    metadata: dict[str, str]


def export_safetensors(
    weights: Mapping[str, Tensor],
    spec: RunSpec,
    *,
    dtype: ExportType = "fp32",
    metadata: Mapping[str, str],
) -> bytes:
    """The safetensors bytes of fp32 ``weights`` by name, stored as ``dtype``; the same bytes for the same weights."""
    tensors = {name: weights[name].to("cpu", _DTYPES[dtype]).clone() for name in sorted(weights)}
    return _in_order(save(tensors, metadata={**metadata, "format": "pt", "spec": spec_as_toml(spec)}))


def _in_order(data: bytes) -> bytes:
    """The same file with the keys of its header sorted: the library writes metadata in another order every time."""
    length = int.from_bytes(data[:8], "little")
    header = json.dumps(json.loads(data[8 : 8 + length]), sort_keys=True, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)
    return len(header).to_bytes(8, "little") + header + data[8 + length :]


def load_exported(data: bytes, layout: ParameterLayout) -> Exported:
    """The model that ``export_safetensors`` wrote for a model of this ``layout``. Raises ExportError."""
    try:
        tensors, metadata = read_safetensors(data)
        spec = parse_run_spec(metadata["spec"], origin="in the export")
    except KeyError as error:
        raise _not_exported("it carries no run spec") from error
    except (ValueError, SpecError) as error:
        raise _not_exported(str(error)) from error
    if {name: tuple(tensor.shape) for name, tensor in tensors.items()} != {
        span.name: span.shape for span in layout.spans
    }:
        raise _not_exported("its tensors are not those of the model")
    values = torch.cat([tensors[span.name].to(torch.float32).flatten() for span in layout.spans])
    return Exported(spec, values, metadata)


def read_safetensors(data: bytes) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors and the string metadata in ``data``. Raises ValueError for anything malformed."""
    try:
        tensors = load(data)
        # The library checks the header but gives metadata only for files on disk.
        length = int.from_bytes(data[:8], "little")
        if length > HEADER_BYTES_MAX:
            raise ValueError(f"a header of {length:,} bytes")
        metadata = json.loads(data[8 : 8 + length]).get("__metadata__") or {}
    except (SafetensorError, KeyError, RuntimeError, TypeError, AttributeError) as error:
        raise ValueError(f"not safetensors: {error}") from error
    return tensors, {str(key): str(value) for key, value in metadata.items()}


def _not_exported(reason: str) -> ExportError:
    return ExportError(
        f"this is not an exported model: {reason}",
        why="an export holds the tensors of one run's model and that run's spec",
        fix="write one: gossamer export",
    )
