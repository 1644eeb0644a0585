"""Causal language models of the library transformers: from a directory on this machine, or from two small files.

Owns what is used of such a directory, and the only imports of transformers and tokenizers: both are the extra
``huggingface``, imported when a run asks for such a model and not before. A model is a config, a tokenizer and weights.
Config and tokenizer travel together, as one shard that a spec names by its hash, so that whoever joins needs no
directory; the weights are the base of the run (``training.base_weights``), fp32 like every base: bf16 and fp16 are
widened, which is exact, and nothing else is taken.

Never runs code that comes with a model, and never asks the network for one: configs are JSON for architectures that
transformers itself ships, weights are safetensors.

Relies on: transformers for the meaning of a config, for the names that its versions gave to tensors, and for tying.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import torch
from torch import Tensor, nn

from p2p import codec
from p2p.errors import GossamerError, MalformedMessage
from training.base_weights import Shapes, shapes_of
from training.export import read_safetensors
from training.spec_sections import MODEL_FILES_BYTES_MAX, PARAMETERS_MAX

CONFIG, TOKENIZER, WEIGHTS = "config.json", "tokenizer.json", "model.safetensors"
INDEX = "model.safetensors.index.json"
"""Names the files of a checkpoint in parts."""

CHECKPOINT_BYTES_MAX = 8 * PARAMETERS_MAX
"""Weights on disk: fp32, and tied ones possibly twice."""

LAYERS_MAX = 512
"""A config that asks for more is refused before anything is built."""

_WIDENED = frozenset({torch.float32, torch.bfloat16, torch.float16})

_NOT_THE_MODEL = frozenset(
    {
        "attn_implementation",
        "dtype",
        "experts_implementation",
        "fusion_config",
        "torch_dtype",
        "transformers_version",
    }
)
"""Keys of a config that say how and by whom it was run, not what it computes. Some make transformers fetch code."""

_REFUSED = {
    "auto_map": "it brings code of its own, and a peer must not run what others wrote",
    "quantization_config": "its weights are quantised, and records move weights by less than a quantum",
}


class PretrainedError(GossamerError):
    """A Hugging Face model that cannot be used here: missing files, another kind of model, or no transformers."""


class _Files(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The shard of a config and a tokenizer."""

    config: str
    tokenizer: str


@dataclass(frozen=True, slots=True)
class Pretrained:
    """What a model is, but for its weights: ``config`` and ``tokenizer`` are JSON, the config in canonical form."""

    config: str
    tokenizer: str

    # --- config and tokenizer -------------------------------------------------------------------------------------

    @classmethod
    def read(cls, directory: Path) -> Pretrained:
        """Those of a model that was saved to ``directory``. Raises PretrainedError."""
        if not directory.is_dir():
            raise PretrainedError(
                f"{directory} is not a directory",
                why="a Hugging Face model is a directory with its config, its tokenizer and its weights",
                fix="name the directory that save_pretrained wrote: --base DIRECTORY",
            )
        config = _read_text(
            directory / CONFIG,
            why="it says what the model is",
            fix="name the directory that save_pretrained wrote",
        )
        tokenizer = _read_text(
            directory / TOKENIZER,
            why="all nodes cut text into the same tokens, and only this form of a tokenizer is the same everywhere",
            fix="write it: AutoTokenizer.from_pretrained(DIRECTORY).save_pretrained(DIRECTORY), in Python",
        )
        found = cls(_canonical(config, f"{directory / CONFIG}"), tokenizer)
        if len(found.to_bytes()) > MODEL_FILES_BYTES_MAX:
            raise PretrainedError(
                f"{CONFIG} and {TOKENIZER} of {directory} have {len(found.to_bytes()):,} bytes",
                why=f"they are sent to everybody who joins: at most {MODEL_FILES_BYTES_MAX:,}",
                fix="choose a model with a smaller vocabulary",
            )
        return found

    @classmethod
    def from_bytes(cls, data: bytes) -> Pretrained:
        """What ``to_bytes`` gave, which may come from anyone. Raises PretrainedError."""
        try:
            files = codec.decode(data, _Files, bytes_max=MODEL_FILES_BYTES_MAX)
        except MalformedMessage as error:
            raise _unusable("what this run names as its model", error.what) from error
        if _canonical(files.config, "the config of this run") != files.config:
            raise _unusable("the config of this run", "it is not in canonical form")
        return cls(files.config, files.tokenizer)

    def to_bytes(self) -> bytes:
        """The shard that a spec names."""
        return codec.encode(_Files(config=self.config, tokenizer=self.tokenizer))

    def files(self) -> dict[str, bytes]:
        """By name, what transformers wants beside the weights to make a model of them."""
        return {CONFIG: self.config.encode(), TOKENIZER: self.tokenizer.encode()}

    def open_tokenizer(self) -> Any:
        """The tokenizer, of the library tokenizers. Raises PretrainedError."""
        _, tokenizers = _libraries()
        try:
            tokenizer = tokenizers.Tokenizer.from_str(self.tokenizer)
        except Exception as error:  # The library raises nothing more precise.
            raise _unusable("the tokenizer", str(error)) from error
        tokenizer.no_truncation()
        tokenizer.no_padding()
        return tokenizer

    # --- the model ------------------------------------------------------------------------------------------------

    def shapes(self) -> Shapes:
        """The shapes of its parameters by name, tied ones once. Raises PretrainedError."""
        return shapes_of(self._built(torch.device("meta")))

    def check(self, *, parameters: int, context: int) -> None:
        """Raise PretrainedError unless this makes a model of so many ``parameters`` that sees ``context`` tokens at
        once and knows all that the tokenizer makes."""
        sketch = self._built(torch.device("meta"))
        if (found := sum(parameter.numel() for parameter in sketch.parameters())) != parameters:
            raise _unusable(
                "the config of this run", f"it makes {found:,} parameters, the run has {parameters:,}"
            )
        positions = getattr(sketch.config.get_text_config(), "max_position_embeddings", None)
        if positions and context > positions:
            raise PretrainedError(
                f"this run's model sees {positions:,} tokens at once, and model.context is {context:,}",
                why="it has no places for more",
                fix=f"set model.context to at most {positions} in the run spec",
            )
        known = sketch.get_input_embeddings().num_embeddings
        largest = max(self.open_tokenizer().get_vocab().values(), default=-1)
        if not 0 <= largest < known:
            raise PretrainedError(
                f"the tokenizer makes tokens up to number {largest:,}, the model knows {known:,}",
                why="the two must have been made for each other",
                fix=f"put the model's own {TOKENIZER} beside its {CONFIG}",
            )

    def build_model(self) -> nn.Module:
        """The model in fp32, without dropout, giving logits and nothing else; what its weights are means nothing."""
        built = self._built(torch.device("cpu"))
        built.config.get_text_config().use_cache = False
        model: nn.Module = built.eval()
        # A hook and no module around it: parameters keep the names that transformers knows them by.
        model.register_forward_hook(_logits_of)
        return model

    def read_weights(self, directory: Path) -> dict[str, Tensor]:
        """The weights in ``directory`` by name, in fp32, tied ones once. Raises PretrainedError."""
        sketch = self._built(torch.device("meta"))
        try:
            model, info = type(sketch).from_pretrained(
                None,
                config=sketch.config,
                state_dict=_read_checkpoint(directory),
                dtype=torch.float32,
                output_loading_info=True,
            )
        except (RuntimeError, ValueError, KeyError, TypeError) as error:
            raise _unusable(f"the weights in {directory}", _first_line(error)) from error
        for name in sorted(info["missing_keys"]):
            raise _unusable(f"the weights in {directory}", f"{name} is missing, or not fp32, bf16 or fp16")
        for name in sorted(info["unexpected_keys"]):
            raise _unusable(f"the weights in {directory}", f"the model that {CONFIG} describes has no {name}")
        return {name: parameter.detach() for name, parameter in model.named_parameters()}

    def _built(self, device: torch.device) -> Any:
        """The model with random weights, or on the device ``meta`` with none."""
        transformers, _ = _libraries()
        fields = json.loads(self.config)
        named = ", ".join(fields.get("architectures") or ()) or fields["model_type"]
        if fields["model_type"] not in transformers.CONFIG_MAPPING:
            raise _unusable(
                "the config", f"transformers {transformers.__version__} knows no {fields['model_type']}"
            )
        try:
            config = transformers.CONFIG_MAPPING[fields["model_type"]].from_dict(fields)
            layers = getattr(config.get_text_config(), "num_hidden_layers", 0)
            if layers > LAYERS_MAX:
                raise ValueError(f"{layers:,} layers, at most {LAYERS_MAX} are allowed")
            if type(config) not in transformers.MODEL_FOR_CAUSAL_LM_MAPPING:
                raise _not_causal(named)
            with device:
                model = transformers.AutoModelForCausalLM.from_config(
                    config, dtype=torch.float32, trust_remote_code=False
                )
        except GossamerError:
            raise
        except Exception as error:  # Whatever a config makes transformers stumble over.
            raise _unusable("the config", _first_line(error)) from error
        if type(model).__name__ not in (fields.get("architectures") or ()):
            # Its weights may be those of, say, a classifier, or were never meant to look back only.
            raise _not_causal(named)
        parameters = {name for name, _ in model.named_parameters(remove_duplicate=False)}
        for name in sorted(model.state_dict().keys() - parameters):
            raise _unusable(
                "the model", f"it has a state besides its weights, {name}, which nobody would send"
            )
        return model


def _logits_of(_model: nn.Module, _inputs: object, output: Any) -> Tensor:
    logits: Tensor = output.logits
    return logits


def _libraries() -> tuple[Any, Any]:
    """Transformers and tokenizers, kept from asking the network. Raises PretrainedError where they are missing."""
    os.environ["HF_HUB_OFFLINE"] = "1"  # Read when they are imported.
    try:
        import tokenizers
        import transformers
    except ImportError as error:
        raise PretrainedError(
            "this run learns a Hugging Face model, and the libraries for that are not installed",
            why=f"they are an extra of gossamer ({error})",
            fix="pip install 'gossamer[huggingface]'",
        ) from error
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    return transformers, tokenizers


def _canonical(text: str, origin: str) -> str:
    """The config in ``text`` without what is not the model, in one form. Raises PretrainedError."""
    try:
        fields = _essence(json.loads(text))
    except (ValueError, RecursionError) as error:
        raise _unusable(origin, f"it is not JSON: {error}") from error
    if not isinstance(fields, dict) or not isinstance(fields.get("model_type"), str):
        raise _unusable(origin, "it names no model_type")
    return json.dumps(fields, sort_keys=True, indent=2) + "\n"


def _essence(value: Any) -> Any:
    """``value`` without the keys, at any depth, that are not the model; those that cannot be used are refused."""
    if isinstance(value, list):
        return [_essence(item) for item in value]
    if not isinstance(value, dict):
        return value
    for key, why in _REFUSED.items():
        if value.get(key):
            raise PretrainedError(
                f"this model cannot be used: its config has the key {key}",
                why=why,
                fix="choose a model of an architecture that transformers ships, in fp32, bf16 or fp16",
            )
    return {
        key: _essence(item)
        for key, item in value.items()
        if key not in _NOT_THE_MODEL and key not in _REFUSED and not key.startswith("_")
    }


def _read_text(file: Path, *, why: str, fix: str) -> str:
    try:
        with file.open("rb") as opened:
            data = opened.read(MODEL_FILES_BYTES_MAX + 1)
        if len(data) > MODEL_FILES_BYTES_MAX:
            raise ValueError(f"longer than {MODEL_FILES_BYTES_MAX:,} bytes")
        return data.decode()
    except FileNotFoundError as error:
        raise PretrainedError(f"there is no {file.name} in {file.parent}", why=why, fix=fix) from error
    except (OSError, ValueError) as error:
        raise PretrainedError(f"cannot read {file}: {error}", why=why, fix=fix) from error


def _read_checkpoint(directory: Path) -> dict[str, Tensor]:
    """The tensors of all files of a checkpoint that can be widened to fp32; masks and the like are left out."""
    tensors: dict[str, Tensor] = {}
    size = 0
    for name in _checkpoint_files(directory):
        file = directory / name
        try:
            size += file.stat().st_size
            if size > CHECKPOINT_BYTES_MAX:
                raise _unusable(f"the weights in {directory}", f"more than {CHECKPOINT_BYTES_MAX:,} bytes")
            found, _ = read_safetensors(file.read_bytes())
        except OSError as error:
            raise _unusable(f"{file}", error.strerror or str(error)) from error
        except ValueError as error:
            raise _unusable(f"{file}", str(error)) from error
        tensors |= {name: tensor for name, tensor in found.items() if tensor.dtype in _WIDENED}
    return tensors


def _checkpoint_files(directory: Path) -> list[str]:
    if (directory / WEIGHTS).is_file():
        return [WEIGHTS]
    if not (directory / INDEX).is_file():
        raise PretrainedError(
            f"there is no {WEIGHTS} in {directory}",
            why="weights are read from safetensors and from nothing else: older formats can carry code",
            fix="write it: AutoModelForCausalLM.from_pretrained(DIRECTORY).save_pretrained(DIRECTORY), in Python",
        )
    try:
        names = sorted(set(json.loads((directory / INDEX).read_text())["weight_map"].values()))
        if any(Path(name).name != name or not name.endswith(".safetensors") for name in names):
            raise ValueError("it names files elsewhere, or of another kind")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise _unusable(f"{directory / INDEX}", str(error)) from error
    return names


def _not_causal(named: str) -> PretrainedError:
    return PretrainedError(
        f"this model is no causal language model: its config names {named}",
        why="what is trained here tells the next token from those before it",
        fix="name the directory of one, such as GPT2LMHeadModel or LlamaForCausalLM: --base DIRECTORY",
    )


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0]


def _unusable(what: str, reason: str) -> PretrainedError:
    return PretrainedError(
        f"cannot use {what}: {reason}",
        why="all nodes of a run build the same model and start it from the same bits",
        fix="save the model anew with the installed version of transformers, and name that directory: --base DIRECTORY",
    )
