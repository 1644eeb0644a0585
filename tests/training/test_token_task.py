"""A Hugging Face model learns from text: as tokens, measured on the bytes that every other model is measured on.

The last test is the whole of one-byte mode on such a model: it learns, the order of records is of no account, and what
is exported is what transformers loads.
"""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch
import transformers
from torch.func import functional_call
from torch.nn import functional

from tests.training.tiny_models import CONTEXT, POSITIONS, save_model, spec_of, tokenizer
from training.data import Corpus, DataError
from training.directions import direction_words, signs_of
from training.export import export_safetensors
from training.huggingface import Pretrained, PretrainedError
from training.one_byte import OneByteLearner, RecordRun, build_one_byte_task
from training.run_spec import RunSpec, SpecError, check_startable, parse_run_spec
from training.tasks import Task
from training.token_task import PIECE_BYTES, TokenTask, tokens_of

RUN = bytes(32)
ROUNDS = 40


def based_spec(pretrained: Pretrained, **keys: object) -> RunSpec:
    parameters = sum(torch.Size(shape).numel() for shape in pretrained.shapes().values())
    keys = {"parameters": parameters} | keys
    return spec_of(files="cd" * 32, files_bytes=len(pretrained.to_bytes()), **keys)


def task_of(directory: Path, corpus: Corpus, part: tuple[int, int] | None = None) -> Task:
    pretrained = Pretrained.read(directory)
    return build_one_byte_task(
        based_spec(pretrained),
        corpus,
        run=RUN,
        peer="peer",
        part=part,
        device="cpu",
        threads=1,
        pretrained=pretrained,
    )


@pytest.fixture
def task(tmp_path: Path, corpus: Corpus) -> Task:
    save_model(tmp_path)
    return task_of(tmp_path, corpus)


# --- text and tokens --------------------------------------------------------------------------------------------------


def test_targets_are_the_inputs_one_token_on(task: Task, corpus: Corpus) -> None:
    inputs, targets = task.batch(3)
    assert inputs.shape == targets.shape == (4, CONTEXT)
    assert torch.equal(inputs[:, 1:], targets[:, :-1])
    assert torch.equal(task.batch(3)[0], inputs)
    assert task.batch_tokens == targets.numel()
    assert tokenizer().decode(inputs[0].tolist()) in corpus.train.tobytes().decode()
    assert task.unit == "token"


def test_what_is_held_out_is_that_of_every_model_of_text(task: Task, corpus: Corpus) -> None:
    held_out = corpus.evaluated_on(4096)
    assert task.held_out_digest == held_out.held_out_digest
    assert task.held_out_bytes == len(held_out.held_out)
    read = torch.cat([targets.flatten() for _, targets in task.held_out(None)])
    text = tokenizer().decode(read.tolist())
    assert text in held_out.held_out.tobytes().decode()
    half = torch.cat([targets.flatten() for _, targets in task.held_out(task.held_out_bytes // 2)])
    assert abs(len(half) / len(read) - 0.5) < CONTEXT / len(read)
    assert torch.cat([targets for _, targets in task.held_out(1)]).shape == (1, CONTEXT)


def test_tokens_are_the_text_however_long_its_lines() -> None:
    made = tokenizer()
    for line in (b"a line\n", b"no line break at all. ", b"\n"):
        text = line * (3 * PIECE_BYTES // len(line))
        assert made.decode(tokens_of(made, text).tolist()).encode() == text
    assert made.decode(tokens_of(made, b"caf\xe9").tolist()) == "caf\N{REPLACEMENT CHARACTER}"
    assert len(tokens_of(made, b"")) == 0


def test_it_writes_as_many_bytes_as_asked_for(task: Task) -> None:
    weights = {name: parameter.detach() for name, parameter in task.model.named_parameters()}
    written = task.sample(weights, b"file 3", 50, 0.8)
    assert len(written) == 50
    assert written == task.sample(weights, b"file 3", 50, 0.8)
    assert written != task.sample(weights, b"file 3", 50, 0.0)
    assert len(task.sample(weights, b"", 3 * POSITIONS, 0.0)) == 3 * POSITIONS


def test_a_tokenizer_of_another_model_is_refused(tmp_path: Path, corpus: Corpus) -> None:
    save_model(tmp_path)
    larger = tokenizer()
    larger.add_tokens([f"more-{number}" for number in range(100)])
    larger.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(PretrainedError, match="tokens up to number 399"):
        task_of(tmp_path, corpus)


def test_too_little_text_is_counted_in_tokens(tmp_path: Path, corpus: Corpus) -> None:
    save_model(tmp_path)
    with pytest.raises(DataError, match="tokens"):
        task_of(tmp_path, corpus, part=(1, 1 << 20))


# --- the spec ---------------------------------------------------------------------------------------------------------


def test_a_spec_is_complete_or_says_that_it_is_not(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match="which Hugging Face model") as caught:
        check_startable(spec_of())
    assert "--base DIRECTORY" in caught.value.fix
    save_model(tmp_path)
    check_startable(based_spec(Pretrained.read(tmp_path)))


@pytest.mark.parametrize(
    ("toml", "said"),
    [
        ('name = "x"\n[model]\nkind = "huggingface"\n', "one_byte"),
        (
            'name = "x"\ninit = "shared"\n[model]\nkind = "huggingface"\nparameters = 3\n[one_byte]\n',
            "belong together",
        ),
        (
            'name = "x"\ninit = "shared"\n[model]\nkind = "huggingface"\n[one_byte]\nbase = "'
            + "ab" * 32
            + '"\n',
            "of one model",
        ),
        (
            'name = "x"\ninit = "shared"\n[model]\nkind = "huggingface"\ncontext = 65536\n'
            "[train]\nbatch = 65536\n[one_byte]\n",
            "tokens",
        ),
    ],
)
def test_a_spec_that_makes_no_sense(toml: str, said: str) -> None:
    with pytest.raises(SpecError, match=said):
        parse_run_spec(toml)


# --- learning ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_a_probe_moves_every_parameter_of_it(tmp_path: Path, corpus: Corpus, kind: str) -> None:
    """Layers are perturbed one by one as the forward pass comes to them, which is for transformers to keep up."""
    save_model(tmp_path, kind)
    pretrained = Pretrained.read(tmp_path)
    task = task_of(tmp_path, corpus)
    one = OneByteLearner(based_spec(pretrained), task, run=RUN, base=pretrained.read_weights(tmp_path))
    inputs, targets = task.batch(0)
    epsilon, key = 1e-2, one._key(b"a" * 16, 0)
    words = direction_words([key], 0, one.state.grid.words, torch.device("cpu"))
    signs = one.state.grid.views(signs_of(words)[0].float())

    def loss_at(step: float) -> float:
        moved = {name: tensor + step * signs[name] for name, tensor in one.weights().items()}
        logits = functional_call(task.model, moved, (inputs,))
        return functional.cross_entropy(logits.flatten(0, -2), targets.flatten()).item()

    def loss() -> torch.Tensor:
        return functional.cross_entropy(task.model(inputs).flatten(0, -2), targets.flatten())

    with torch.no_grad():
        expected = (loss_at(epsilon) - loss_at(-epsilon)) / (2 * epsilon)
    assert one._prober.slope(loss, key, epsilon) == pytest.approx(expected, abs=1e-4)
    assert abs(expected) > 1e-2


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_records_teach_it_in_any_order_and_transformers_loads_what_comes_out(
    tmp_path: Path, corpus: Corpus, kind: str
) -> None:
    save_model(tmp_path, kind)
    pretrained = Pretrained.read(tmp_path)
    spec = based_spec(pretrained)
    learners = [
        OneByteLearner(
            spec, task_of(tmp_path, corpus, part=(number, 2)), run=RUN, base=pretrained.read_weights(tmp_path)
        )
        for number in (1, 2)
    ]
    rng = random.Random(0)
    before = learners[0].evaluate()
    for number in range(ROUNDS):
        first = 4 * number
        runs = [
            RecordRun(log, first, first, one.probe(log, first).records)
            for log, one in zip((b"a" * 16, b"b" * 16), learners, strict=True)
        ]
        for one in learners:
            one.apply(rng.sample(runs, len(runs)))
    assert learners[0].digest() == learners[1].digest()
    assert learners[0].evaluate() < before - 0.02

    exported = tmp_path / "exported"
    exported.mkdir()
    (exported / "model.safetensors").write_bytes(export_safetensors(learners[0].weights(), spec, metadata={}))
    task = learners[0].task
    assert isinstance(task, TokenTask)
    for name, data in task.pretrained.files().items():
        (exported / name).write_bytes(data)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(exported, local_files_only=True)
    inputs, _ = task.batch(0)
    with torch.no_grad():
        assert torch.equal(loaded(inputs).logits, task.model(inputs))
    assert transformers.AutoTokenizer.from_pretrained(exported, local_files_only=True)("file 3")["input_ids"]
    again = Pretrained.read(exported)
    assert again.to_bytes() == pretrained.to_bytes()
    assert all(
        torch.equal(tensor, learners[1].weights()[name])
        for name, tensor in again.read_weights(exported).items()
    )
