"""An export is readable by the safetensors library alone, comes back bit for bit, and anything else is refused."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from training.export import ExportError, export_safetensors, load_exported, read_safetensors
from training.run_spec import parse_run_spec
from training.trainer import Trainer


def exported(trainer: Trainer, **options: str) -> bytes:
    return export_safetensors(
        trainer.layout.views(trainer.read()), trainer.spec, metadata={"step": "7"}, **options
    )


def test_any_program_finds_the_model_by_its_tensors_names(trainer: Trainer, tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(exported(trainer))
    with safe_open(path, framework="pt") as file:
        assert file.metadata()["step"] == "7"
        assert parse_run_spec(file.metadata()["spec"]) == trainer.spec
        assert set(file.keys()) == {span.name for span in trainer.layout.spans}
        assert file.get_tensor("blocks.1.up.weight").shape == (64, 16)


def test_an_export_comes_back_bit_for_bit(trainer: Trainer) -> None:
    back = load_exported(exported(trainer), trainer.layout)
    assert torch.equal(back.values, trainer.read())
    assert back.spec == trainer.spec
    assert back.metadata["step"] == "7"


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_smaller_types_halve_the_file(trainer: Trainer, dtype: str) -> None:
    data = exported(trainer, dtype=dtype)
    assert len(data) < 0.8 * len(exported(trainer))
    assert torch.allclose(load_exported(data, trainer.layout).values, trainer.read(), rtol=1e-2)


def test_other_bytes_and_other_models_are_refused(trainer: Trainer) -> None:
    data = exported(trainer)
    for bad in (b"", data[:-1], data.replace(b"blocks.0.up", b"blocks.9.up"), trainer.save()):
        with pytest.raises(ExportError):
            load_exported(bad, trainer.layout)


def test_the_same_weights_are_the_same_file() -> None:
    program = (
        "import sys, torch; from training.export import export_safetensors as e; "
        "from training.run_spec import RunSpec; "
        "w = {name: torch.arange(9.0) for name in 'cab'}; m = {str(k): str(k) for k in range(20)}; "
        "sys.stdout.buffer.write(e(w, RunSpec(name='x'), metadata=m))"
    )
    files = {subprocess.run([sys.executable, "-c", program], stdout=-1, check=True).stdout for _ in range(3)}
    assert len(files) == 1
    weights, metadata = read_safetensors(files.pop())
    assert set(weights) == {"a", "b", "c"}
    assert metadata["7"] == "7"
