"""The run spec: everything a swarm must agree on, from TOML to canonical bytes to the run id.

Owns the schema, its bounds and its two forms: TOML, which people write, and canonical CBOR, which is hashed into the
run id and fetched from peers. Never holds what is one node's own (ports, devices, data paths) and never code. Bytes
from a peer pass the same checks as a file of one's own; that they belong to the run is for the caller to see by
comparing ``run_id``.

Some sections come in kinds, told apart by one key: ``model.kind``, ``data.source`` and ``optimizer.kind``. A file may
leave that key out and means the default's; the canonical bytes always name it.

Relies on: ``p2p.codec`` for the hardened canonical encoding, ``p2p.schema`` for what is wrong with a file.
"""

from __future__ import annotations

import itertools
import tomllib
from pathlib import Path
from typing import Annotated, Any, Literal, TypeAlias

import msgspec
from blake3 import blake3
from msgspec import UNSET, Meta, UnsetType

from p2p import codec
from p2p.errors import GossamerError, MalformedMessage
from p2p.schema import explain, with_default_kinds

FORMAT = 2
"""Version of the canonical form. Another number is another run, and another program."""

SPEC_BYTES_MAX = 64 << 10
"""The longest spec, as TOML and as canonical bytes."""

PARAMETERS_MAX = 1 << 28
"""Parameters of the largest model: in fp32 one gibibyte, so that every fragment fits into a shard."""

MODEL_FILES_BYTES_MAX = 64 << 20
"""The largest config and tokenizer of a Hugging Face model, together."""

TOKENS_PER_STEP_MAX = 1 << 22

ACTIVATIONS_PER_STEP_MAX = 1 << 26
"""Numbers in a layer's output for one batch of an MLP: in fp32 256 MiB."""

MixingRuleName = Literal["mean", "variance_corrected"]
Wire = Literal["fp32", "bf16"]


class SpecError(GossamerError):
    """A run spec that cannot be used: the file, the key, what is wrong and what would be right."""


class _Section(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Base of all sections: immutable, every key known, every value bounded."""


def _check_size(parameters: int) -> None:
    if parameters > PARAMETERS_MAX:
        raise ValueError(f"{parameters:,} parameters are more than the {PARAMETERS_MAX:,} allowed")


class GptSpec(_Section, frozen=True, kw_only=True, tag_field="kind", tag="gpt"):
    """A byte-level GPT (``training.model``), which learns from text."""

    vocab: Literal[256] = 256
    """Tokens are bytes."""
    layers: Annotated[int, Meta(ge=1, le=128)] = 6
    width: Annotated[int, Meta(ge=8, le=8192)] = 144
    heads: Annotated[int, Meta(ge=1, le=128)] = 4
    context: Annotated[int, Meta(ge=8, le=65536)] = 128
    """Bytes the model sees at once."""

    def __post_init__(self) -> None:
        if self.width % self.heads:
            raise ValueError(
                f"width must be a multiple of heads, and {self.width} is not one of {self.heads}"
            )
        _check_size(self.parameters)

    @property
    def parameters(self) -> int:
        """Parameters of the model, tied tensors counted once."""
        block = 12 * self.width**2 + 2 * self.width
        return self.layers * block + (self.vocab + self.context + 1) * self.width


class MlpSpec(_Section, frozen=True, kw_only=True, tag_field="kind", tag="mlp"):
    """A multi-layer perceptron (``training.mlp``), which learns to tell the classes of labelled examples apart."""

    inputs: Annotated[int, Meta(ge=1, le=65536)]
    """Features of an example."""
    hidden: Annotated[tuple[Annotated[int, Meta(ge=1, le=8192)], ...], Meta(max_length=127)] = (100,)
    """Widths of the layers between features and classes."""
    classes: Annotated[int, Meta(ge=2, le=65536)]
    activation: Literal["relu", "tanh"] = "relu"

    def __post_init__(self) -> None:
        _check_size(self.parameters)

    @property
    def widths(self) -> tuple[int, ...]:
        """Of all layers, the inputs and the classes among them."""
        return (self.inputs, *self.hidden, self.classes)

    @property
    def layers(self) -> int:
        """Layers that have weights."""
        return len(self.hidden) + 1

    @property
    def parameters(self) -> int:
        """Weights and biases of the model."""
        return sum((fan_in + 1) * fan_out for fan_in, fan_out in itertools.pairwise(self.widths))


class HuggingFaceSpec(_Section, frozen=True, kw_only=True, tag_field="kind", tag="huggingface"):
    """A causal language model of the library transformers (``training.huggingface``), which learns from text.

    What the model is belongs to the base, which ``--base DIRECTORY`` names and these hashes stand for: a file leaves
    all but ``context`` out.
    """

    files: Annotated[str, Meta(pattern=r"^([0-9a-f]{64})?\Z")] = ""
    """Root of the shard of its config and tokenizer, hex."""
    files_bytes: Annotated[int, Meta(ge=0, le=MODEL_FILES_BYTES_MAX)] = 0
    """Size of that shard."""
    parameters: Annotated[int, Meta(ge=0, le=PARAMETERS_MAX)] = 0
    """Parameters of the model, tied tensors counted once."""
    context: Annotated[int, Meta(ge=8, le=65536)] = 128
    """Tokens the model sees at once."""

    def __post_init__(self) -> None:
        if not bool(self.files) == bool(self.files_bytes) == bool(self.parameters):
            raise ValueError("files, files_bytes and parameters belong together: gossamer fills them in")

    @property
    def layers(self) -> int:
        """Groups of tensors that fragments may be made of."""
        return 1


ModelSpec: TypeAlias = GptSpec | MlpSpec | HuggingFaceSpec


class _TextSpec(_Section, frozen=True, kw_only=True, tag_field="source"):
    held_out_bytes: Annotated[int, Meta(ge=4096, le=16 << 20)] = 256 << 10
    """Held-out text that an evaluation reads, at most."""


class StdlibDataSpec(_TextSpec, frozen=True, kw_only=True, tag="stdlib"):
    """The Python standard library's own sources (``training.data``)."""


class TextDataSpec(_TextSpec, frozen=True, kw_only=True, tag="text"):
    """Text files that each node names for itself (``training.data``)."""


class NpzDataSpec(_Section, frozen=True, kw_only=True, tag_field="source", tag="npz"):
    """Labelled examples in an .npz file that each node names for itself (``training.labelled``)."""

    held_out_examples: Annotated[int, Meta(ge=1, le=1 << 20)] = 10_000
    """Held-out examples that an evaluation reads, at most."""


DataSpec: TypeAlias = StdlibDataSpec | TextDataSpec | NpzDataSpec

LearningRate: TypeAlias = Annotated[float, Meta(gt=0, le=1)]
Steps: TypeAlias = Annotated[int, Meta(ge=0, le=1_000_000)]
Decay: TypeAlias = Annotated[float, Meta(ge=0, le=1)]
ClipNorm: TypeAlias = Annotated[float, Meta(gt=0, le=1000)]
Fraction: TypeAlias = Annotated[float, Meta(ge=0, le=1)]
Memory: TypeAlias = Annotated[float, Meta(ge=0, lt=1)]


class AdamWSpec(_Section, frozen=True, kw_only=True, tag_field="kind", tag="adamw"):
    """AdamW with linear warm-up and cosine decay, the gradient clipped by its global norm."""

    learning_rate: LearningRate = 2e-3
    """The peak, reached after the warm-up."""
    warmup_steps: Steps = 20
    weight_decay: Decay = 0.1
    """On weights and embeddings only."""
    beta1: Memory = 0.9
    beta2: Memory = 0.95
    clip_norm: ClipNorm = 1.0
    min_rate_fraction: Fraction = 0.1
    """Where the cosine ends, as a fraction of the peak."""


class SgdSpec(_Section, frozen=True, kw_only=True, tag_field="kind", tag="sgd"):
    """Stochastic gradient descent with momentum, under the same schedule and clipping as AdamW.

    ``warmup_steps = 0`` and ``min_rate_fraction = 1`` keep the rate constant.
    """

    learning_rate: LearningRate = 0.05
    """The peak, reached after the warm-up."""
    warmup_steps: Steps = 0
    momentum: Memory = 0.9
    weight_decay: Decay = 0.0
    """On weights and embeddings only, and of the weights themselves, not by way of the momentum, as in AdamW."""
    clip_norm: ClipNorm = 1.0
    min_rate_fraction: Fraction = 0.1
    """Where the cosine ends, as a fraction of the peak."""


OptimizerSpec: TypeAlias = AdamWSpec | SgdSpec


class TrainSpec(_Section, frozen=True):
    """How long and how much at a time."""

    steps: Annotated[int, Meta(ge=1, le=100_000_000)] = 600
    """Inner steps of each node."""
    batch: Annotated[int, Meta(ge=1, le=65536)] = 8
    """Sequences, or labelled examples, in a step."""
    precision: Literal["auto", "fp32"] = "auto"
    """``auto``: bf16 autocast on CUDA, fp32 elsewhere."""


class ExchangeSpec(_Section, frozen=True):
    """Who is mixed with, how often, and by which rule."""

    every_steps: Annotated[int, Meta(ge=1, le=1_000_000)] = 5
    """Inner steps between exchanges (H)."""
    probability: Annotated[float, Meta(gt=0, le=1)] = 1.0
    """The chance that an exchange which is due takes place: fewer exchanges at random times (arXiv 2507.06542)."""
    peers: Annotated[int, Meta(ge=1, le=64)] = 1
    """Members pulled from in an exchange (s)."""
    fragments: Annotated[int, Meta(ge=1, le=128)] = 1
    """Parts the model is cut into; an exchange moves one of them (S)."""
    rule: Literal["mean", "variance_corrected", "none"] = "variance_corrected"
    """``none``: nothing is exchanged before the scheduled merges."""
    wire: Wire = "fp32"


class MergeSpec(_Section, frozen=True):
    """When all members average exactly, and how long they wait for each other."""

    points: Annotated[tuple[Annotated[float, Meta(gt=0, le=1)], ...], Meta(max_length=64)] = (1.0,)
    """Progress (fractions of ``train.steps``) at which a merge is due, ascending."""
    replicas: Annotated[int, Meta(ge=1, le=16)] = 1
    """Members that sum each fragment independently."""
    wait_s_max: Annotated[float, Meta(ge=1, le=86400)] = 60.0
    """A due merge starts at the latest this long after the first member was ready."""
    period_s: Annotated[float, Meta(ge=1, le=604_800)] = 300.0
    """Members unheard for three of these stop counting in the quorum."""

    def __post_init__(self) -> None:
        if list(self.points) != sorted(set(self.points)):
            raise ValueError("merge points must ascend, each named once")


class OneByteSpec(_Section, frozen=True):
    """One-byte mode: what is learned travels as one byte for each pair of forward passes (``training.one_byte``)."""

    base: Annotated[str, Meta(pattern=r"^([0-9a-f]{64})?\Z")] = ""
    """Root of the shard of the base weights (``training.base_weights``), hex; empty: initial weights, drawn alike.
    ``--base`` fills it in."""
    trained: Annotated[
        tuple[Annotated[str, Meta(min_length=1, max_length=256)], ...], Meta(max_length=64)
    ] = ("*",)
    """Patterns of the names of what is trained, such as ``*.bias``; the rest stays as it is in the base."""
    step_size: LearningRate = 1e-4
    """By which a projected gradient is multiplied when a record is applied."""
    halvings: Annotated[tuple[Annotated[int, Meta(ge=1, le=2**53)], ...], Meta(max_length=32)] = ()
    """Clocks, in records, at which the step size halves; ascending."""
    clip: Annotated[float, Meta(ge=1e-6, le=1e6)] = 10.0
    """The largest projected gradient that a byte can tell, in nats per unit of length along a direction."""
    epsilon: Annotated[float, Meta(ge=1e-6, le=1.0)] = 1e-3
    """How far a probe goes along a direction, to both sides."""
    probes: Annotated[int, Meta(ge=1, le=1024)] = 1
    """Directions probed on each minibatch: a step makes that many records."""
    table: Literal["log", "sign"] = "log"
    """What a byte stands for; ``sign``: only whether the loss rose or fell."""
    pool: Annotated[int, Meta(ge=0, le=1 << 20)] = 0
    """Directions that all records share, so that applying any number of records costs as much as applying these;
    0: each record has its own."""
    batch_records: Annotated[int, Meta(ge=1, le=4096)] = 64
    """Records that are signed and sent at once."""
    batch_s_max: Annotated[float, Meta(ge=0.1, le=3600)] = 10.0
    """A record is sent at the latest this long after it was made."""
    snapshot_records: Annotated[int, Meta(ge=0, le=1 << 40)] = 65_536
    """Records between snapshots, from which newcomers start and below which no fork reaches; 0: none are made."""
    snapshot_votes: Annotated[int, Meta(ge=1, le=1024)] = 2
    """Members that must have come to the same snapshot before anybody relies on it."""
    log_allowance: Annotated[int, Meta(ge=4096, le=1 << 30)] = 65_536
    """Records that a log may hold whatever its clock says (docs/PROTOCOL.md, "Batches")."""
    log_share_percent: Annotated[int, Meta(ge=1, le=100)] = 100
    """Records beyond these, in percent of all that are applied. 100 bounds nobody; a few times a fair share keeps a
    flood out."""
    log_reach: Annotated[int, Meta(ge=4096, le=1 << 30)] = 65_536
    """How many records a clock may be ahead of what is applied before its batch has to wait."""
    log_opening_cost: Annotated[int, Meta(ge=0, le=1 << 30)] = 16_384
    """Records of the swarm, beyond the reach, for each time that an author starts over with a new log."""

    def __post_init__(self) -> None:
        if list(self.halvings) != sorted(set(self.halvings)):
            raise ValueError("one_byte.halvings must ascend, each named once")


class RunSpec(_Section, frozen=True):
    """A whole run. Two nodes with different specs are in different runs and never meet."""

    name: Annotated[str, Meta(pattern=r"^[a-z0-9][a-z0-9._-]{0,47}\Z")]
    seed: Annotated[int, Meta(ge=0, le=2**53)] = 0
    init: Literal["per-peer", "shared"] = "per-peer"
    """Whether each node draws its own initial weights or all draw the same."""
    model: ModelSpec = GptSpec()
    data: DataSpec = StdlibDataSpec()
    optimizer: OptimizerSpec = AdamWSpec()
    train: TrainSpec = TrainSpec()
    exchange: ExchangeSpec = ExchangeSpec()
    merge: MergeSpec = MergeSpec()
    one_byte: OneByteSpec | UnsetType = UNSET
    """One-byte mode: in place of optimizer, exchange and merge, of which it has no use."""

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

    def _check_one_byte(self, spec: OneByteSpec) -> None:
        if self.init != "shared":
            raise ValueError(
                'in one-byte mode all nodes start from the same weights: set init = "shared" beside the name'
            )
        unused = {"optimizer": AdamWSpec(), "exchange": ExchangeSpec(), "merge": MergeSpec()}
        for section, default in unused.items():
            if getattr(self, section) != default:
                raise ValueError(f"one-byte mode has no use of the section {section}: leave it out")
        if isinstance(self.model, HuggingFaceSpec) and bool(self.model.files) != bool(spec.base):
            raise ValueError(
                "model.files and one_byte.base are of one model: leave both out, and name its directory with --base"
            )
        if spec.probes > spec.batch_records:
            raise ValueError(
                f"one_byte.probes ({spec.probes}) must not exceed one_byte.batch_records ({spec.batch_records}): "
                "the records of a step travel in one batch"
            )


class _Versioned(_Section, frozen=True):
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
    # The JSON of a plain name, a number or a list of numbers is its TOML; JSON shortens 1e-05 to a form TOML reads.
    return msgspec.json.encode(value).decode()


def _unusable(origin: str, reason: str) -> SpecError:
    return SpecError(
        f"cannot use the run spec {origin}: {reason}",
        why="all nodes of a run read the same spec",
        fix="correct the file, or start from examples/demo.toml",
    )
