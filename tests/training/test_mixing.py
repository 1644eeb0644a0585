"""The promises of the mixing rules, for any models, and of the bounds on what a peer may send."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from training import mixing
from training.layout import TensorSpan
from training.mixing import Refused, check_peer_values, mix
from training.spec_sections import MixingRuleName

SPANS = [
    TensorSpan("weight", 0, 600, (20, 30), "weight"),
    TensorSpan("bias", 600, 620, (20,), "bias"),
    TensorSpan("norm", 620, 640, (20,), "norm"),
    TensorSpan("embedding", 640, 940, (10, 30), "embedding"),
    TensorSpan("scalar", 940, 941, (1,), "scalar"),
]
SIZE = 941
RULES: list[MixingRuleName] = ["mean", "variance_corrected"]


def model(seed: int, *, scale: float = 0.02, shift: float = 0.0) -> torch.Tensor:
    values = torch.randn(SIZE, generator=torch.Generator().manual_seed(seed)) * scale + shift
    values[620:640] += 1.0
    return values


models = st.lists(
    st.builds(
        model,
        st.integers(0, 2**31),
        scale=st.floats(1e-4, 1.0),
        shift=st.floats(-1.0, 1.0),
    ),
    min_size=2,
    max_size=5,
)
rules = st.sampled_from(RULES)


@given(rules, models, st.randoms(use_true_random=False))
def test_mixing_is_invariant_under_permutation_bit_for_bit(
    rule: MixingRuleName, members: list[torch.Tensor], rng: object
) -> None:
    own, *others = members
    first = mix(rule, own, others, SPANS)
    for own, *others in itertools.islice(itertools.permutations(members), 8):
        again = mix(rule, own, others, SPANS)
        assert torch.equal(again.values, first.values)
        assert again.gain_max == first.gain_max


@given(rules, models)
def test_equal_models_stay_what_they_are(rule: MixingRuleName, members: list[torch.Tensor]) -> None:
    own = members[0]
    result = mix(rule, own, [own.clone() for _ in members[1:]], SPANS)
    assert torch.allclose(result.values, own, rtol=1e-5, atol=1e-6)
    assert result.variance_ratio_before == pytest.approx(1.0, abs=1e-4)


@given(rules, models)
def test_the_mean_of_every_tensor_is_the_mean_over_the_set(
    rule: MixingRuleName, members: list[torch.Tensor]
) -> None:
    mixed = mix(rule, members[0], members[1:], SPANS).values.double()
    plain = torch.stack(members).double().mean(0)
    for span in SPANS:
        part = slice(span.start, span.stop)
        assert mixed[part].mean().item() == pytest.approx(plain[part].mean().item(), abs=1e-6)


@given(models)
def test_variance_is_restored_to_the_mean_of_the_set_within_the_bound_on_the_gain(
    members: list[torch.Tensor],
) -> None:
    result = mix("variance_corrected", members[0], members[1:], SPANS)
    stack = torch.stack(members).double()
    assert 1.0 <= result.gain_max <= math.sqrt(len(members))
    for span in SPANS:
        part = slice(span.start, span.stop)
        plain = stack[:, part].mean(0)
        if span.kind in ("norm", "scalar"):
            assert torch.allclose(result.values[part].double(), plain, atol=1e-6)
            continue
        target = stack[:, part].var(1, correction=0).mean().item()
        reachable = len(members) * plain.var(correction=0).item()
        got = result.values[part].double().var(correction=0).item()
        assert got == pytest.approx(min(target, reachable), rel=1e-3)


def test_the_plain_mean_of_uncorrelated_models_loses_variance_and_reports_it() -> None:
    members = [model(seed) for seed in range(4)]
    plain, corrected = (mix(rule, members[0], members[1:], SPANS) for rule in RULES)
    assert plain.variance_ratio_before == pytest.approx(0.25, abs=0.05)
    assert plain.variance_ratio_after == plain.variance_ratio_before == corrected.variance_ratio_before
    assert plain.gain_max == 1.0
    assert corrected.variance_ratio_after == pytest.approx(1.0, abs=0.05)


def test_models_that_cancel_gain_no_more_than_the_bound_and_constant_ones_nothing() -> None:
    own = model(0)
    opposite = mix("variance_corrected", own, [-own], SPANS)
    assert opposite.gain_max <= math.sqrt(2)
    assert bool(torch.isfinite(opposite.values).all())
    constant = mix("variance_corrected", torch.zeros(SIZE), [torch.ones(SIZE)], SPANS)
    assert torch.equal(constant.values, torch.full((SIZE,), 0.5))
    assert constant.gain_max == 1.0


@pytest.mark.parametrize(("mean", "std"), [(0.0, 0.02), (1.0, 1e-3), (-300.0, 0.1), (0.02, 0.02)])
def test_moments_agree_with_fp64_however_small_the_variance(mean: float, std: float) -> None:
    values = torch.randn(200_001, generator=torch.Generator().manual_seed(3)) * std + mean
    moments = mixing._moments(values)
    assert moments.mean == pytest.approx(values.double().mean().item(), rel=1e-6, abs=1e-6 * std)
    assert moments.variance == pytest.approx(values.double().var(correction=0).item(), rel=1e-5)


def refused(theirs: torch.Tensor, own: torch.Tensor | None = None) -> str | None:
    result = check_peer_values(model(0) if own is None else own, theirs, SPANS)
    return result.code if isinstance(result, Refused) else None


def test_a_like_model_is_accepted() -> None:
    assert refused(model(1)) is None
    assert refused(model(1, scale=0.05)) is None


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("index", [0, 619, 940])
def test_one_element_that_is_not_finite_is_refused(value: float, index: int) -> None:
    theirs = model(1)
    theirs[index] = value
    assert refused(theirs) == "non-finite"


def test_other_shapes_are_refused() -> None:
    assert refused(model(1)[:-1]) == "shape"
    assert refused(model(1)[None]) == "shape"


def test_hugely_scaled_values_are_refused_even_when_their_squares_overflow() -> None:
    assert refused(model(1) * 11) == "norm"
    assert refused(torch.full((SIZE,), 3e38)) == "norm"
    assert refused(torch.full((SIZE,), 3e38) * torch.randn(SIZE).sign()) == "norm"


def test_a_single_hugely_scaled_tensor_is_refused_by_norm_or_variance() -> None:
    theirs = model(1)
    theirs[640:940] *= 4
    assert refused(theirs) == "variance"
    theirs[640:940] *= 4
    assert refused(theirs) == "norm"


def test_tensors_that_start_at_zero_or_constant_do_not_refuse_a_model_that_has_begun_to_train() -> None:
    fresh, trained = model(0), model(1)
    fresh[600:620], fresh[620:640] = 0.0, 1.0
    trained[600:620] = 1e-3
    assert refused(trained, own=fresh) is None


def test_a_beginner_takes_trained_weights_but_nothing_hugely_scaled() -> None:
    trained = model(2, scale=0.5)
    assert refused(trained) in ("norm", "variance")
    assert check_peer_values(model(0), trained, SPANS, beginner=True) is None
    for scale in (100.0, 1e30):
        result = check_peer_values(model(0), model(2, scale=scale), SPANS, beginner=True)
        assert isinstance(result, Refused)
