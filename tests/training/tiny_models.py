"""Hugging Face models small enough for a test, as ``save_pretrained`` leaves them: nothing is downloaded."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import tokenizers
import torch
import transformers
from tokenizers import decoders, models, pre_tokenizers, trainers

from training.run_spec import RunSpec, parse_run_spec

CONTEXT, POSITIONS, VOCABULARY = 16, 64, 320

SPEC = """
name = "tiny-huggingface"
init = "shared"
[model]
kind = "huggingface"
context = 16
[data]
source = "text"
held_out_bytes = 4096
[train]
batch = 4
steps = 20
[one_byte]
probes = 4
batch_records = 8
step_size = 1e-4
"""

CONFIGS: dict[str, Any] = {
    # Tied embeddings and dropout; the other one has neither.
    "gpt2": lambda: transformers.GPT2Config(
        n_layer=2,
        n_embd=16,
        n_head=2,
        n_positions=POSITIONS,
        vocab_size=VOCABULARY,
        bos_token_id=0,
        eos_token_id=0,
    ),
    "llama": lambda: transformers.LlamaConfig(
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        intermediate_size=32,
        max_position_embeddings=POSITIONS,
        vocab_size=VOCABULARY,
    ),
}


def spec_of(**model: object) -> RunSpec:
    """The run of a tiny model, which ``model`` says more about."""
    lines = "".join(f"{key} = {json.dumps(value)}\n" for key, value in model.items())
    based = 'base = "' + "ab" * 32 + '"\n' if "files" in model else ""
    return parse_run_spec(SPEC.replace("[data]", lines + "[data]") + based)


def save_model(directory: Path, kind: str = "gpt2", *, seed: int = 0, **saving: Any) -> Any:
    """Save a model and its tokenizer to ``directory``; returns the model. ``dtype`` is that of its weights."""
    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(CONFIGS[kind]())
    model = model.to(saving.pop("dtype", torch.float32)).eval()
    model.save_pretrained(directory, **saving)
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer()).save_pretrained(directory)
    return model


def tokenizer() -> tokenizers.Tokenizer:
    """Every byte, and the commonest pairs of a little text."""
    made = tokenizers.Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    made.train_from_iterator([f"file {n} line {n}\n" for n in range(40)], trainer)
    return made


def edit_json(file: Path, **changes: object) -> None:
    """Change keys of a JSON file; None takes one out."""
    fields = json.loads(file.read_text()) | changes
    for key in [key for key, value in changes.items() if value is None]:
        del fields[key]
    file.write_text(json.dumps(fields))
