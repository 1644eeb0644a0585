"""The run spec: everything a swarm must agree on, from TOML to canonical bytes to the run id.

Owns what must hold between the sections of a spec, and its two forms: TOML, which people write, and canonical CBOR,
which is hashed into the run id and fetched from peers. Never holds what is one node's own (ports, devices, data paths)
and never code. Bytes from a peer pass the same checks as a file of one's own; that they belong to the run is for the
caller to see by comparing ``run_id``.

Relies on: ``training.spec_sections`` for the sections, ``p2p.codec`` for the hardened canonical encoding,
``p2p.schema`` for what is wrong with a file.
"""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Annotated, Any

import msgspec
from blake3 import blake3
from msgspec import UNSET, Meta, UnsetType

from p2p import codec
from p2p.errors import GossamerError, MalformedMessage
from p2p.schema import explain, with_default_kinds
from training.spec_sections import (
    AdamWSpec,
    DataSpec,
    ExchangeSpec,
    GptSpec,
    HuggingFaceSpec,
    Init,
    MergeSpec,
    MlpSpec,
    ModelSpec,
    NesterovSpec,
    NpzDataSpec,
    OneByteSpec,
    OptimizerSpec,
    OuterSpec,
    Outliers,
    PairsSpec,
    PlainOuterSpec,
    ScheduleSpec,
    Section,
    StdlibDataSpec,
    TrainSpec,
)

FORMAT = 4
"""Version of the canonical form. Another number is another run, and another program."""

SPEC_BYTES_MAX = 64 << 10
"""The longest spec, as TOML and as canonical bytes."""

TOKENS_PER_STEP_MAX = 1 << 22

ACTIVATIONS_PER_STEP_MAX = 1 << 26
"""Numbers in a layer's output for one batch of an MLP: in fp32 256 MiB."""


class SpecError(GossamerError):
    """A run spec that cannot be used: the file, the key, what is wrong and what would be right."""


class RunSpec(Section, frozen=True):
    """A whole run. Two nodes with different specs are in different runs and never meet."""

    name: Annotated[str, Meta(pattern=r"^[a-z0-9][a-z0-9._-]{0,47}\Z")]
    seed: Annotated[int, Meta(ge=0, le=2**53)] = 0
    init: Init = "per-peer"
    """Whether each node draws its own initial weights or all draw the same."""
    outliers: Outliers = "leave-out"
    """Whether weights that are unlike everybody else's are left out of averages (``training.outliers``). Where members
    have data of different kinds and are trusted, keep them."""
    model: ModelSpec = GptSpec()
    data: DataSpec = StdlibDataSpec()
    optimizer: OptimizerSpec = AdamWSpec()
    train: TrainSpec = TrainSpec()
    schedule: ScheduleSpec = ScheduleSpec()
    exchange: ExchangeSpec = ExchangeSpec()
    merge: MergeSpec = MergeSpec()
    outer: OuterSpec = PlainOuterSpec()
    one_byte: OneByteSpec | UnsetType = UNSET
    """One-byte mode: in place of optimizer, schedule, exchange, merge and outer, of which it has no use."""

    def __post_init__(self) -> None:
        if isinstance(self.model, MlpSpec) != isinstance(self.data, NpzDataSpec):
            raise ValueError(
                "model.kind = mlp learns from labelled examples, data.source = npz, and no other model does"
            )
        if isinstance(self.one_byte, OneByteSpec):
            self._check_one_byte(self.one_byte)
        elif isinstance(self.model, HuggingFaceSpec):
            raise ValueError(
                "model.kind = huggingface starts from given weights, which is for one-byte mode: add a section one_byte"
            )
        if self.exchange.fragments > self.model.layers:
            raise ValueError(
                f"exchange.fragments ({self.exchange.fragments}) must not exceed the layers of the model "
                f"({self.model.layers}): fragments are groups of whole layers"
            )
        if isinstance(self.outer, NesterovSpec) and self.outer.streaming and self.exchange.fragments == 1:
            raise ValueError(
                "outer.streaming moves one fragment at a time, and exchange.fragments = 1 makes it the whole model: "
                f"set exchange.fragments from 2 to {self.model.layers}"
            )
        if isinstance(self.outer, PairsSpec):
            self._check_pairs()
        match self.model:
            case GptSpec(context=context) | HuggingFaceSpec(context=context) if (
                self.train.batch * context > TOKENS_PER_STEP_MAX
            ):
                raise ValueError(
                    f"train.batch times model.context must not exceed {TOKENS_PER_STEP_MAX:,} tokens"
                )
            case MlpSpec(widths=widths) if self.train.batch * max(widths) > ACTIVATIONS_PER_STEP_MAX:
                raise ValueError(
                    f"train.batch times the widest layer must not exceed {ACTIVATIONS_PER_STEP_MAX:,} numbers"
                )

    def _check_pairs(self) -> None:
        if self.exchange.fragments != 1:
            raise ValueError(
                f"outer.kind = pairs moves whole models: set exchange.fragments from {self.exchange.fragments} to 1"
            )
        if self.exchange.rule != "variance_corrected" or any(p.peers != 1 for p in self.schedule.phases):
            raise ValueError(
                "outer.kind = pairs has no use of exchange.rule, nor of more than one peer: leave them out"
            )

    def _check_one_byte(self, spec: OneByteSpec) -> None:
        if self.init != "shared":
            raise ValueError(
                'in one-byte mode all nodes start from the same weights: set init = "shared" beside the name'
            )
        unused = {
            "optimizer": AdamWSpec(),
            "schedule": ScheduleSpec(),
            "exchange": ExchangeSpec(),
            "merge": MergeSpec(),
            "outer": PlainOuterSpec(),
        }
        for section, default in unused.items():
            if getattr(self, section) != default:
                raise ValueError(f"one-byte mode has no use of the section {section}: leave it out")
        if self.outliers != "leave-out":
            raise ValueError("one-byte mode has no use of outliers: leave it out")
        if isinstance(self.model, HuggingFaceSpec) and bool(self.model.files) != bool(spec.base):
            raise ValueError(
                "model.files and one_byte.base are of one model: leave both out, and name its directory with --base"
            )
        if spec.probes > spec.batch_records:
            raise ValueError(
                f"one_byte.probes ({spec.probes}) must not exceed one_byte.batch_records ({spec.batch_records}): "
                "the records of a step travel in one batch"
            )


class _Versioned(Section, frozen=True):
    """What is hashed: the spec under the version of its form."""

    format: int
    spec: RunSpec


def load_run_spec(path: Path) -> RunSpec:
    """The spec in a TOML file. Raises SpecError, naming the file."""
    try:
        with path.open("rb") as file:
            data = file.read(SPEC_BYTES_MAX + 1)
        toml = data.decode()
    except OSError as error:
        raise SpecError(
            f"cannot read the run spec {path}: {error.strerror}",
            why="a run is described by one TOML file",
            fix="name an existing file, for example examples/demo.toml",
        ) from error
    except UnicodeDecodeError as error:
        raise _unusable(str(path), "it is not UTF-8 text") from error
    return parse_run_spec(toml, origin=str(path))


def parse_run_spec(toml: str, *, origin: str = "given as text") -> RunSpec:
    """The spec that ``toml`` describes; ``origin`` names it in errors. Raises SpecError."""
    if len(toml.encode()) > SPEC_BYTES_MAX:
        raise _unusable(origin, f"it is longer than {SPEC_BYTES_MAX:,} bytes")
    try:
        fields = with_default_kinds(tomllib.loads(toml), RunSpec)
    except tomllib.TOMLDecodeError as error:
        raise _unusable(origin, f"it is not TOML: {error}") from error
    try:
        return msgspec.convert(fields, RunSpec)
    except msgspec.ValidationError as error:
        found = explain(error, fields, RunSpec)
        raise SpecError(
            f"cannot use the run spec {origin}: {found.what}", why=found.why, fix=found.fix
        ) from error


def check_startable(spec: RunSpec) -> None:
    """Raise SpecError for a spec that leaves open which model it means."""
    if isinstance(spec.model, HuggingFaceSpec) and not spec.model.files:
        raise SpecError(
            f"the run spec {spec.name} does not say which Hugging Face model it starts from",
            why="hashes stand for it, which are taken from its directory by whoever starts the run",
            fix="name the directory: gossamer run --run SPEC.toml --base DIRECTORY",
        )


def canonical_bytes(spec: RunSpec) -> bytes:
    """The canonical CBOR of ``spec`` under its format version: what peers fetch and what is hashed."""
    return codec.encode(_Versioned(format=FORMAT, spec=spec))


def run_id(spec: RunSpec) -> bytes:
    """BLAKE3 of the canonical bytes, 32 bytes: the identity of the run."""
    return blake3(canonical_bytes(spec)).digest()


def spec_from_bytes(data: bytes) -> RunSpec:
    """The spec whose canonical bytes are ``data``, which may come from anyone. Raises SpecError."""
    try:
        versioned = codec.decode(data, _Versioned, bytes_max=SPEC_BYTES_MAX)
    except MalformedMessage as error:
        raise SpecError(
            f"these bytes are not a run spec: {error.what}",
            why="a spec is used only in its canonical form",
            fix="ask another peer, or check that both sides run the same version of gossamer",
        ) from error
    if versioned.format != FORMAT:
        raise SpecError(
            f"the run spec has format {versioned.format}, this program reads format {FORMAT}",
            why="a run's rules are part of its identity",
            fix="use the version of gossamer that the run was made with",
        )
    return versioned.spec


def spec_as_toml(spec: RunSpec) -> str:
    """``spec`` as TOML with every key written out; parses back to an equal spec."""
    fields: dict[str, Any] = msgspec.to_builtins(spec)
    lines = [f"{key} = {_toml_value(value)}" for key, value in fields.items() if not isinstance(value, dict)]
    for section, values in fields.items():
        if isinstance(values, dict):
            lines += ["", f"[{section}]", *(f"{key} = {_toml_value(value)}" for key, value in values.items())]
    return "\n".join(lines) + "\n"


def _toml_value(value: object) -> str:
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(_toml_value, value))}]"
    if isinstance(value, dict):
        return "{ " + ", ".join(f"{key} = {_toml_value(item)}" for key, item in value.items()) + " }"
    # The JSON of a plain name, a number or a list of numbers is its TOML; JSON shortens 1e-05 to a form TOML reads.
    return msgspec.json.encode(value).decode()


def _unusable(origin: str, reason: str) -> SpecError:
    return SpecError(
        f"cannot use the run spec {origin}: {reason}",
        why="all nodes of a run read the same spec",
        fix="correct the file, or start from examples/demo.toml",
    )
