"""Signatures of simulations: as the product needs them, and worth nothing in another world."""

import pytest

from netsim.signer import SIGNATURE_BYTES, StubSigner, machine_peer, world_key
from p2p.identity import Identity, Signer, public_key_of
from p2p.transport import PeerId

KEY = world_key(1)
ALICE, BOB = (StubSigner(machine_peer(1, number), KEY) for number in range(2))


def test_anybody_in_the_world_can_check_a_signature() -> None:
    signer: Signer = ALICE
    signature = signer.sign("purpose", b"payload")
    assert len(signature) == SIGNATURE_BYTES == len(Identity.generate().sign("purpose", b"payload"))
    for checker in (ALICE, BOB):
        assert checker.verify(ALICE.peer, "purpose", b"payload", signature)


@pytest.mark.parametrize(
    ("peer", "purpose", "payload"),
    [
        (BOB.peer, "purpose", b"payload"),
        (ALICE.peer, "other purpose", b"payload"),
        (ALICE.peer, "purpose", b"Payload"),
        (ALICE.peer, "purpos", b"epayload"),
        (ALICE.peer, "", b"purpose\x00payload"),
        (PeerId("not a peer id"), "purpose", b"payload"),
    ],
)
def test_a_signature_is_of_one_peer_for_one_purpose_over_one_payload(
    peer: PeerId, purpose: str, payload: bytes
) -> None:
    assert not BOB.verify(peer, purpose, payload, ALICE.sign("purpose", b"payload"))


@pytest.mark.parametrize(
    "mangle", [lambda s: s[:-1], lambda s: s + b"\0", lambda s: bytes(64), lambda s: b""]
)
def test_a_mangled_signature_does_not_verify(mangle) -> None:
    assert not BOB.verify(ALICE.peer, "purpose", b"payload", mangle(ALICE.sign("purpose", b"payload")))


def test_other_worlds_have_other_keys_names_and_signatures() -> None:
    stranger = StubSigner(ALICE.peer, world_key(2))
    assert not stranger.verify(ALICE.peer, "purpose", b"payload", ALICE.sign("purpose", b"payload"))
    names = {machine_peer(seed, number) for seed in range(3) for number in range(50)}
    assert len(names) == 150


def test_names_are_valid_peer_ids_and_nothing_else_signs() -> None:
    assert len(public_key_of(machine_peer(1, 0))) == 32
    assert machine_peer(1, 0) == machine_peer(1, 0)
    with pytest.raises(ValueError, match="not an Ed25519 peer id"):
        StubSigner(PeerId("2short"), KEY)
