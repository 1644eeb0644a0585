"""A spec's model and data become a task; what it is measured on is counted in bytes, whatever it learns."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from training.data import Corpus, DataError
from training.labelled import LabelledData
from training.run_spec import RunSpec, parse_run_spec
from training.tasks import Data, Task, build_task, load_data
from training.windows import Batch


def task_of(spec: RunSpec, data: Data, part: tuple[int, int] | None = None) -> Task:
    generator = torch.Generator().manual_seed(0)
    return build_task(spec, data, part=part, seed=b"s", generator=generator, device=torch.device("cpu"))


def joined(batches: list[Batch]) -> tuple[torch.Tensor, torch.Tensor]:
    inputs, targets = zip(*batches, strict=True)
    return torch.cat(inputs), torch.cat(targets)


def test_data_is_loaded_as_the_spec_says(tmp_path: Path, spec: RunSpec, labelled_spec: RunSpec) -> None:
    np.savez(tmp_path / "x.npz", x=np.eye(6, dtype=np.float32), y=np.arange(6) % 4)
    (tmp_path / "x.txt").write_bytes(np.random.default_rng(0).bytes(200_000))
    text = parse_run_spec('name = "x"\n[data]\nsource = "text"')
    loaded = load_data(labelled_spec, tmp_path / "x.npz")
    assert isinstance(loaded, LabelledData)
    assert len(loaded.train) + len(loaded.held_out) == 6
    found = load_data(text, tmp_path / "x.txt")
    assert isinstance(found, Corpus)
    assert len(found.train) + len(found.held_out) == 200_000
    assert isinstance(load_data(spec, None), Corpus)
    for without_path in (text, labelled_spec):
        with pytest.raises(DataError, match="no path"):
            load_data(without_path, None)


def test_text_targets_are_the_inputs_one_byte_on(spec: RunSpec, corpus: Corpus) -> None:
    task = task_of(spec, corpus)
    inputs, targets = task.batch(3)
    assert inputs.shape == targets.shape == (4, 16)
    assert torch.equal(inputs[:, 1:], targets[:, :-1])
    assert task.batch_tokens == targets.numel()
    _, held_out = joined(list(task.held_out(None)))
    assert bytes(held_out.flatten().tolist()) == corpus.held_out.tobytes()[1 : held_out.numel() + 1]
    assert task.held_out_bytes == len(corpus.held_out)


def test_held_out_examples_come_whole_in_order_and_as_many_as_the_bytes_say(
    labelled_spec: RunSpec, labelled: LabelledData
) -> None:
    task = task_of(labelled_spec, labelled)
    inputs, targets = joined(list(task.held_out(None)))
    assert np.array_equal(inputs.numpy(), labelled.held_out.x)
    assert np.array_equal(targets.numpy(), labelled.held_out.y)
    assert task.held_out_bytes == len(labelled.held_out) * (6 * 4 + 8)
    assert task.held_out_digest == labelled.held_out_digest
    for bytes_max, examples in [(1, 1), (2 * 32, 2), (3 * 32 - 1, 2), (1 << 30, len(labelled.held_out))]:
        assert len(joined(list(task.held_out(bytes_max)))[1]) == examples
    assert task.batch(0)[0].shape == (task.batch_tokens, 6)


def test_a_node_learns_from_its_part_only(labelled_spec: RunSpec, labelled: LabelledData) -> None:
    parts = [task_of(labelled_spec, labelled, part=(k, 2)) for k in (1, 2)]
    drawn = [{tuple(row.tolist()) for number in range(30) for row in task.batch(number)[0]} for task in parts]
    assert not drawn[0] & drawn[1]
