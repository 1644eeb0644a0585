"""A spec survives its two forms unchanged, its id names all of it, and mistakes are answered with the way out."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from p2p import codec
from training.run_spec import (
    FORMAT,
    SPEC_BYTES_MAX,
    RunSpec,
    SpecError,
    canonical_bytes,
    load_run_spec,
    parse_run_spec,
    run_id,
    spec_as_toml,
    spec_from_bytes,
)
from training.spec_sections import GptSpec, MlpSpec, NpzDataSpec, SgdSpec

RUN_ID_OF_DEMO = "bd8b0510f4df308bf900ba961a6d2195aa4e8ac446d450f59247174c41e14700"
EXAMPLES = sorted((Path(__file__).parents[2] / "examples").glob("*.toml"))


def test_a_name_is_enough_and_defaults_make_a_laptop_sized_model() -> None:
    assert 1e6 <= parse_run_spec('name = "mine"').model.parameters <= 2e6


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.name)
def test_examples_load_and_survive_both_forms(path: Path) -> None:
    spec = load_run_spec(path)
    assert parse_run_spec(spec_as_toml(spec)) == spec
    assert spec_from_bytes(canonical_bytes(spec)) == spec


@given(
    rate=st.floats(min_value=1e-12, max_value=1.0),
    seed=st.integers(min_value=0, max_value=2**53),
    ends=st.sets(st.floats(min_value=1e-9, max_value=0.999), max_size=5),
)
def test_any_values_survive_both_forms(rate: float, seed: int, ends: set[float]) -> None:
    toml = f"""
    name = "any"
    seed = {seed}
    [optimizer]
    learning_rate = {rate!r}
    [schedule]
    preset = "custom"
    phases = [{", ".join(f"{{ until = {end!r}, merges = 1 }}" for end in [*sorted(ends), 1.0])}]
    """
    spec = parse_run_spec(toml)
    assert spec.optimizer.learning_rate == rate
    assert spec_from_bytes(canonical_bytes(spec)) == parse_run_spec(spec_as_toml(spec)) == spec


def test_the_run_id_is_fixed_for_ever_and_depends_on_every_key() -> None:
    spec = RunSpec(name="demo")
    ids = {run_id(spec), run_id(msgspec.structs.replace(spec, seed=1))}
    for field in msgspec.structs.fields(GptSpec):
        if field.name != "vocab":
            value = getattr(spec.model, field.name)
            model = msgspec.structs.replace(spec.model, **{field.name: value * 2})
            ids.add(run_id(msgspec.structs.replace(spec, model=model)))
    assert len(ids) == 6
    assert run_id(spec).hex() == RUN_ID_OF_DEMO


MLP = '[model]\nkind = "mlp"\ninputs = 64\nclasses = 10\n'


@pytest.mark.parametrize(
    ("toml", "what", "help_with_it"),
    [
        ("[model]\nlayrs = 3", "there is no key model.layrs", "did you mean layers?"),
        ("modle = 3", "there is no key modle", "did you mean model?"),
        ("[model]\nlayers = 300", "model.layers = 300", "from 1 to 128"),
        ("[model]\nkind = 'mpl'", "model.kind", "did you mean mlp?"),
        ("[model]\nkind = 3", "model.kind", '"gpt", "mlp"'),
        ("[model]\nkind = 'mlp'\ninputs = 3", "model.classes is missing", "from 2 to 65,536"),
        (MLP + "layers = 3", "there is no key model.layers", "kind, inputs, hidden, classes, activation"),
        (MLP + "hidden = [4, 0]", "model.hidden[1] = 0", "from 1 to 8,192"),
        (MLP + "hidden = 4", "model.hidden", "a list of up to 127"),
        (MLP + "hidden = [8192, 8192, 8192, 8192, 8192]", "parameters", "[model]"),
        (MLP, "learns from labelled examples, data.source = npz", "correct"),
        ("[data]\nsource = 'npz'", "learns from labelled examples, data.source = npz", "correct"),
        ("[data]\nsource = 'npz'\nheld_out_bytes = 4096", "no key data.held_out_bytes", "held_out_examples"),
        ("[data]\nsource = 'csv'", "data.source", '"stdlib", "text", "npz"'),
        (MLP + "[data]\nsource = 'npz'\n[exchange]\nfragments = 3", "the layers of the model (2)", "correct"),
        (MLP + "hidden = [8192]\n[data]\nsource = 'npz'\n[train]\nbatch = 8193", "widest layer", "correct"),
        ("[optimizer]\nkind = 'sgd'\nbeta1 = 0.1", "there is no key optimizer.beta1", "momentum"),
        ("[optimizer]\nkind = 'sgd'\nmomentum = 1", "optimizer.momentum", "from 0 below 1"),
        ("[optimizer]\nmomentum = 0.5", "there is no key optimizer.momentum", "kind, learning_rate"),
        ("[optimizer]\nlearning_rate = nan", "optimizer.learning_rate", "above 0 to 1"),
        ("[optimizer]\nlearning_rate = inf", "optimizer.learning_rate", "above 0 to 1"),
        ("[schedule]\npreset = 'dense'", "schedule.preset", "did you mean early-dense?"),
        ("[exchange]\nrule = 'men'", "exchange.rule", '"mean", "variance_corrected"'),
        ("[train]\nbatch = 'many'", "train.batch", "from 1 to 65,536"),
        ("[outer]\nkind = 'nesterov'\nrate = 1.5", "outer.momentum = 0.9: set it to 1.35", "[outer]"),
        ("[outer]\nkind = 'nesterov'\nwire = 'e3'", "outer.wire", '"e3m0"'),
        ("[outer]\nkind = 'pairs'\nmomentum = 0.9", "outer.momentum = 0.9: set it to 0.37", "[outer]"),
        ("[outer]\nkind = 'pairs'\n[exchange]\nfragments = 2", "fragments from 2 to 1", "correct"),
        ("[outer]\nkind = 'pairs'\n[exchange]\nrule = 'mean'", "no use of exchange.rule", "correct"),
        ("[outer]\nkind = 'nesterov'\nstreaming = true", "set exchange.fragments from 2 to 6", "correct"),
        ("[outer]\nrate = 0.5", "there is no key outer.rate", "kind"),
        ("[schedule]\npreset = 'custom'\nphases = [{ until = 2.0 }]", "phases[0].until", "above 0 to 1"),
        ("[schedule]\npreset = 'custom'\nphases = [{ until = 0.5 }]", "last until = 1.0", "[schedule]"),
        ("[schedule]\npreset = 'custom'", "needs them", "[schedule]"),
        ("[schedule]\nphases = [{ until = 1.0 }]", 'preset = "custom"', "[schedule]"),
        ("[model]\nwidth = 130\nheads = 7", "multiple of heads", "[model]"),
        ("[model]\nwidth = 8192\nlayers = 128", "parameters", "[model]"),
        ("[exchange]\nfragments = 7", "must not exceed the layers of the model (6)", "correct"),
        ("[model]\ncontext = 65536\n[train]\nbatch = 128", "tokens", "correct"),
        ("model = 3", "model = 3", "gpt, mlp"),
        ("= 3", "not TOML", "demo.toml"),
    ],
)
def test_a_mistake_is_named_with_what_is_allowed(toml: str, what: str, help_with_it: str) -> None:
    with pytest.raises(SpecError) as caught:
        parse_run_spec(f'name = "x"\n{toml}', origin="x.toml")
    assert "x.toml" in caught.value.what
    assert what in caught.value.what
    assert help_with_it in f"{caught.value.why} {caught.value.fix}"


def test_a_section_that_does_not_say_its_kind_is_of_the_default_kind() -> None:
    bare, told = (
        parse_run_spec(f'name = "x"\n[model]\n{model}layers = 3\n[data]\n{data}\n[optimizer]\n{optimizer}')
        for model, data, optimizer in [
            ("", "", ""),
            ('kind = "gpt"\n', 'source = "stdlib"', 'kind = "adamw"'),
        ]
    )
    assert bare == told
    assert run_id(bare) == run_id(told)


def test_kinds_tell_runs_apart_and_survive_both_forms() -> None:
    labelled = MLP + '[data]\nsource = "npz"\n'
    texts = [
        "",
        "[data]\nsource = 'text'",
        "[optimizer]\nkind = 'sgd'",
        labelled,
        labelled + "held_out_examples = 5",
    ]
    specs = [parse_run_spec(f'name = "x"\n{text}') for text in texts]
    assert len({run_id(spec) for spec in specs}) == len(specs)
    for spec in specs:
        assert spec_from_bytes(canonical_bytes(spec)) == parse_run_spec(spec_as_toml(spec)) == spec
    assert isinstance(specs[2].optimizer, SgdSpec)
    assert isinstance(specs[3].model, MlpSpec)
    assert isinstance(specs[4].data, NpzDataSpec)


def test_an_mlp_counts_its_weights_and_biases() -> None:
    model = MlpSpec(inputs=64, hidden=(100,), classes=10)
    assert model.parameters == 64 * 100 + 100 + 100 * 10 + 10
    assert MlpSpec(inputs=64, hidden=(), classes=10).layers == 1


def test_a_missing_name_a_missing_file_and_bytes_that_are_no_text_are_spec_errors(tmp_path: Path) -> None:
    (tmp_path / "binary.toml").write_bytes(b"\xff\xfe")
    with pytest.raises(SpecError, match="name is missing"):
        parse_run_spec("seed = 1")
    with pytest.raises(SpecError, match="cannot read"):
        load_run_spec(tmp_path / "none.toml")
    with pytest.raises(SpecError, match="UTF-8"):
        load_run_spec(tmp_path / "binary.toml")
    with pytest.raises(SpecError, match="longer"):
        parse_run_spec("#" * (SPEC_BYTES_MAX + 1))


@given(st.binary(max_size=200))
def test_any_bytes_from_a_peer_are_refused(data: bytes) -> None:
    with pytest.raises(SpecError):
        spec_from_bytes(data)


def test_only_the_canonical_bytes_of_a_valid_spec_of_this_format_are_accepted() -> None:
    data = canonical_bytes(RunSpec(name="demo"))
    for changed in (data + b"\0", data[:-1], data.replace(b"demo", b"DEMO"), b"\0" * (SPEC_BYTES_MAX + 1)):
        with pytest.raises(SpecError):
            spec_from_bytes(changed)

    class Future(msgspec.Struct):
        format: int
        spec: RunSpec

    with pytest.raises(SpecError, match=f"format {FORMAT + 1}"):
        spec_from_bytes(codec.encode(Future(format=FORMAT + 1, spec=RunSpec(name="demo"))))
