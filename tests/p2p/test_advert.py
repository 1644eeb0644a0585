"""Adverts: what is signed comes back, and nothing else counts."""

from __future__ import annotations

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from p2p.advert import ADVERTS_MAX, LIST_BYTES_MAX, Claim, chosen_by_name, read_list, sign_advert
from p2p.errors import AdvertError
from p2p.identity import Identity

NOW_S = 1_700_000_000
ALICE, BOB = Identity.generate(), Identity.generate()


def claim_of(
    name: str = "stdlib-gpt", run: str = "ab" * 32, signer: Identity = ALICE, **more: object
) -> Claim:
    fields = {
        "name": name,
        "about": "a small model of Python",
        "run": run,
        "parameters": 1_550_160,
        "addresses": [f"/ip4/45.1.0.7/tcp/4100/p2p/{signer.peer}"],
        "expires_unix_s": NOW_S + 60,
    }
    return Claim(**fields | more)  # type: ignore[arg-type]


def read(*lines: str, now_s: float = NOW_S):  # type: ignore[no-untyped-def]
    return read_list("\n".join(lines).encode(), now_s, origin="here")


def test_what_a_member_has_signed_is_on_the_list() -> None:
    first, second = sign_advert(ALICE, claim_of()), sign_advert(BOB, claim_of("other", "cd" * 32, BOB))
    adverts, unusable = read("# kept by hand", "", first.line(), second.line(), "")
    assert adverts == [first, second]
    assert unusable == []
    assert [advert.claim.run for advert in chosen_by_name(adverts, "other")] == ["cd" * 32]


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (lambda text: text.replace("small", "large"), "its signature is not that of the peer"),
        (lambda text: text.replace(ALICE.peer, BOB.peer), "its signature is not that of the peer"),
        (lambda text: text.replace("ab" * 32, "ac" * 32), "its signature is not that of the peer"),
        (lambda text: text[:-5], "truncated"),
        (lambda text: "[]", "Expected `object`"),
        (lambda text: text.replace('"parameters"', '"paramaters"'), "unknown field"),
        (lambda text: text.replace("stdlib-gpt", "../../etc"), "matching regex"),
        (lambda text: text.replace("/ip4", "ip4"), "matching regex"),
        (lambda text: text.replace("a small", "a" * 201), "length <= 200"),
    ],
)
def test_a_line_that_was_changed_is_told_and_passed_over(change, why: str) -> None:  # type: ignore[no-untyped-def]
    good = sign_advert(BOB, claim_of("good"))
    adverts, (unusable,) = read(good.line(), change(sign_advert(ALICE, claim_of()).line()))
    assert adverts == [good]
    assert unusable.line == 2
    assert why in unusable.why


def test_adverts_end() -> None:
    assert read(sign_advert(ALICE, claim_of()).line(), now_s=NOW_S + 59)[1] == []
    adverts, (unusable,) = read(sign_advert(ALICE, claim_of()).line(), now_s=NOW_S + 60)
    assert (adverts, unusable.why) == ([], "it has expired")


def test_a_name_may_be_that_of_several_members_and_of_one_run() -> None:
    of_alice, of_bob = sign_advert(ALICE, claim_of()), sign_advert(BOB, claim_of(signer=BOB))
    assert chosen_by_name([of_alice, of_bob], "stdlib-gpt") == [of_alice, of_bob]
    with pytest.raises(AdvertError, match="no swarm called nobody"):
        chosen_by_name([of_alice], "nobody")
    with pytest.raises(AdvertError, match="2 swarms are called stdlib-gpt") as refused:
        chosen_by_name([of_alice, sign_advert(BOB, claim_of(run="cd" * 32))], "stdlib-gpt")
    assert "ab" * 32 in refused.value.fix


@pytest.mark.parametrize("data", [b"x" * (LIST_BYTES_MAX + 1), b"\n" * (ADVERTS_MAX + 1)])
def test_an_endless_list_is_refused(data: bytes) -> None:
    with pytest.raises(AdvertError, match="too long"):
        read_list(data, NOW_S, origin="here")


@given(st.binary(max_size=300))
def test_whatever_is_on_a_list_is_read_or_passed_over(data: bytes) -> None:
    adverts, unusable = read_list(data, NOW_S, origin="here")
    assert adverts == []
    assert len(unusable) <= len(data.splitlines())


@given(st.text(max_size=200), st.integers(0, 2**53))
def test_any_words_survive(about: str, parameters: int) -> None:
    advert = sign_advert(ALICE, claim_of(about=about, parameters=parameters))
    assert read(advert.line()) == ([advert], [])
    assert msgspec.json.decode(advert.line())["claim"]["about"] == about
