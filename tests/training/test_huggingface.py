"""Hugging Face models from a directory: the numbers of transformers, one form for all nodes, and what is refused.

The models are made by the tests, of random weights.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.training.tiny_models import CONFIGS, CONTEXT, POSITIONS, edit_json, save_model
from training.base_weights import base_from_bytes, base_to_bytes
from training.huggingface import LAYERS_MAX, Pretrained, PretrainedError

TOKENS = torch.arange(2 * CONTEXT).view(2, CONTEXT)


def parameters_of(pretrained: Pretrained) -> int:
    return sum(torch.Size(shape).numel() for shape in pretrained.shapes().values())


def use_all_of(directory: Path) -> None:
    pretrained = Pretrained.read(directory)
    pretrained.open_tokenizer()
    pretrained.read_weights(directory)


@pytest.mark.parametrize("kind", CONFIGS)
def test_a_directory_becomes_the_model_that_transformers_makes_of_it(tmp_path: Path, kind: str) -> None:
    theirs = save_model(tmp_path, kind)
    pretrained = Pretrained.from_bytes(Pretrained.read(tmp_path).to_bytes())
    weights = pretrained.read_weights(tmp_path)
    assert {name: tuple(tensor.shape) for name, tensor in weights.items()} == pretrained.shapes()
    assert list(weights) == [name for name, _ in theirs.named_parameters()]
    pretrained.check(parameters=parameters_of(pretrained), context=CONTEXT)
    model = pretrained.build_model()
    model.load_state_dict(base_from_bytes(base_to_bytes(weights), pretrained.shapes()), strict=False)
    with torch.no_grad():
        logits = model(TOKENS)
        assert torch.equal(logits, theirs(TOKENS).logits)
        assert torch.equal(logits, model(TOKENS)), "dropout is off"


def test_tied_tensors_are_one(tmp_path: Path) -> None:
    save_model(tmp_path, "gpt2")
    names = Pretrained.read(tmp_path).read_weights(tmp_path).keys()
    assert "transformer.wte.weight" in names
    assert "lm_head.weight" not in names
    save_model(tmp_path / "llama", "llama")
    assert "lm_head.weight" in Pretrained.read(tmp_path / "llama").read_weights(tmp_path / "llama")


def test_a_checkpoint_in_parts_is_the_same(tmp_path: Path) -> None:
    save_model(tmp_path / "whole")
    save_model(tmp_path / "parts", max_shard_size="20KB")
    assert len(list((tmp_path / "parts").glob("*.safetensors"))) > 1
    whole, parts = (
        Pretrained.read(directory).read_weights(directory)
        for directory in (tmp_path / "whole", tmp_path / "parts")
    )
    assert base_to_bytes(whole) == base_to_bytes(parts)


def test_names_and_masks_of_older_checkpoints_are_understood(tmp_path: Path) -> None:
    """As GPT-2 was published: without the prefix, and with causal masks among the weights."""
    save_model(tmp_path)
    pretrained = Pretrained.read(tmp_path)
    before = pretrained.read_weights(tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = {name.removeprefix("transformer."): tensor for name, tensor in load_file(file).items()}
    masks = {f"h.{layer}.attn.bias": torch.ones(1, 1, POSITIONS, POSITIONS) for layer in range(2)}
    save_file(tensors | masks, file)
    assert base_to_bytes(pretrained.read_weights(tmp_path)) == base_to_bytes(before)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_widened_exactly(tmp_path: Path, dtype: torch.dtype) -> None:
    model = save_model(tmp_path, dtype=dtype)
    weights = Pretrained.read(tmp_path).read_weights(tmp_path)
    for name, parameter in model.named_parameters():
        assert weights[name].dtype == torch.float32
        assert torch.equal(weights[name], parameter.detach().float())


def test_how_it_was_run_is_no_part_of_a_model(tmp_path: Path) -> None:
    save_model(tmp_path / "a")
    save_model(tmp_path / "b", dtype=torch.bfloat16)
    edit_json(
        tmp_path / "b" / "config.json",
        _name_or_path="somebody/else",
        attn_implementation="somebody/kernels",
        transformers_version="4.0.0",
    )
    assert Pretrained.read(tmp_path / "a").to_bytes() == Pretrained.read(tmp_path / "b").to_bytes()


def config(**changes: object) -> Callable[[Path], object]:
    return lambda directory: edit_json(directory / "config.json", **changes)


def without(name: str) -> Callable[[Path], object]:
    return lambda directory: (directory / name).unlink()


def weights(change: Callable[[dict[str, torch.Tensor]], object]) -> Callable[[Path], object]:
    def spoil(directory: Path) -> None:
        tensors = load_file(directory / "model.safetensors")
        change(tensors)
        save_file(tensors, directory / "model.safetensors")

    return spoil


NAME = "transformer.h.0.ln_1.weight"


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (without("config.json"), "no config.json"),
        (without("tokenizer.json"), "no tokenizer.json"),
        (without("model.safetensors"), "no model.safetensors"),
        (lambda directory: (directory / "config.json").write_text("{"), "not JSON"),
        (lambda directory: (directory / "config.json").write_text("[" * 100_000), "not JSON"),
        (lambda directory: (directory / "tokenizer.json").write_text("{}"), "the tokenizer"),
        (lambda directory: (directory / "tokenizer.json").write_bytes(b"\xff"), "cannot read"),
        (lambda directory: (directory / "model.safetensors").write_bytes(b"PK\x03\x04"), "not safetensors"),
        (config(model_type=None), "no model_type"),
        (config(model_type="of-the-future"), "knows no of-the-future"),
        (config(model_type="vit", architectures=["ViTModel"]), "no causal language model: .* ViTModel"),
        (
            config(architectures=["GPT2ForSequenceClassification"]),
            "no causal .* GPT2ForSequenceClassification",
        ),
        (config(architectures=None), "no causal language model"),
        (config(auto_map={"AutoModelForCausalLM": "theirs.Model"}), "auto_map"),
        (config(quantization_config={"quant_method": "gptq"}), "quantization_config"),
        (config(n_layer=LAYERS_MAX + 1), "layers"),
        (config(n_head=3), "the config"),
        (config(n_embd=32), "the weights"),
        (weights(lambda tensors: tensors.pop(NAME)), f"{NAME} is missing"),
        (
            weights(lambda tensors: tensors.update({NAME: tensors[NAME].double()})),
            f"{NAME} is missing, or not fp32",
        ),
        (weights(lambda tensors: tensors.update({NAME: tensors[NAME].to(torch.int8)})), f"{NAME} is missing"),
        (weights(lambda tensors: tensors.update({"head.weight": torch.zeros(3)})), "has no head.weight"),
    ],
)
def test_what_cannot_be_used_is_refused_and_said(
    tmp_path: Path, spoil: Callable[[Path], object], said: str
) -> None:
    save_model(tmp_path)
    spoil(tmp_path)
    with pytest.raises(PretrainedError, match=said) as caught:
        use_all_of(tmp_path)
    assert caught.value.why
    assert caught.value.fix


def test_a_path_that_is_no_directory(tmp_path: Path) -> None:
    with pytest.raises(PretrainedError, match="not a directory"):
        Pretrained.read(tmp_path / "missing")


def test_parts_elsewhere_are_not_followed(tmp_path: Path) -> None:
    save_model(tmp_path, max_shard_size="20KB")
    index = {"weight_map": {NAME: "../secret.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(PretrainedError, match="elsewhere"):
        Pretrained.read(tmp_path).read_weights(tmp_path)


def test_bytes_of_a_peer_pass_the_same_checks(tmp_path: Path) -> None:
    save_model(tmp_path)
    sound = Pretrained.read(tmp_path)
    fields = json.loads(sound.config)
    for config, said in [
        ("{", "not JSON"),
        (json.dumps(fields | {"auto_map": {"AutoConfig": "theirs.Config"}}), "auto_map"),
        (
            json.dumps(fields | {"attn_implementation": "their/kernels"}, sort_keys=True, indent=2),
            "canonical",
        ),
        (json.dumps(fields), "canonical"),
    ]:
        with pytest.raises(PretrainedError, match=said):
            Pretrained.from_bytes(Pretrained(config, sound.tokenizer).to_bytes())
    with pytest.raises(PretrainedError, match="names as its model"):
        Pretrained.from_bytes(sound.to_bytes() + b"\x00")


def test_a_model_other_than_the_spec_says_is_refused(tmp_path: Path) -> None:
    save_model(tmp_path)
    pretrained = Pretrained.read(tmp_path)
    parameters = parameters_of(pretrained)
    with pytest.raises(PretrainedError, match="parameters"):
        pretrained.check(parameters=parameters + 1, context=CONTEXT)
    with pytest.raises(PretrainedError, match=f"{POSITIONS} tokens at once"):
        pretrained.check(parameters=parameters, context=POSITIONS + 1)


def test_without_the_extra_it_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_model(tmp_path)
    monkeypatch.setitem(sys.modules, "transformers", None)
    pretrained = Pretrained.read(tmp_path)
    with pytest.raises(PretrainedError, match="not installed") as caught:
        pretrained.shapes()
    assert "gossamer[huggingface]" in caught.value.fix


def test_nothing_imports_transformers_before_it_is_needed() -> None:
    program = (
        "import sys, cli.main, node.daemon, netsim.world;"
        "print({'transformers', 'tokenizers', 'huggingface_hub'} & set(sys.modules))"
    )
    shown = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert shown.stdout == "set()\n"
