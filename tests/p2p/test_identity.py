"""The key file and what it promises."""

from __future__ import annotations

from pathlib import Path

import base58
import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import rsa

from p2p.errors import IdentityError
from p2p.identity import Identity, peer_id_of, public_key_of
from p2p.transport import PeerId


def test_a_key_is_private_and_survives_a_reload(tmp_path: Path) -> None:
    path = tmp_path / "key.pem"
    created = Identity.create(path)
    assert path.stat().st_mode & 0o777 == 0o600
    loaded = Identity.load(path)
    assert loaded.peer == created.peer
    assert loaded.sign("test", b"x") == created.sign("test", b"x")


def test_an_existing_key_is_never_overwritten(tmp_path: Path) -> None:
    path = tmp_path / "key.pem"
    peer = Identity.create(path).peer
    with pytest.raises(IdentityError, match="already holds a key"):
        Identity.create(path)
    assert Identity.load(path).peer == peer


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o666])
def test_a_key_that_others_can_read_is_refused(tmp_path: Path, mode: int) -> None:
    path = tmp_path / "key.pem"
    Identity.create(path)
    path.chmod(mode)
    with pytest.raises(IdentityError, match="other users") as refused:
        Identity.load(path)
    assert refused.value.fix == f"chmod 600 {path}"


def test_what_is_not_our_kind_of_key_is_refused(tmp_path: Path) -> None:
    with pytest.raises(IdentityError, match="no identity key"):
        Identity.load(tmp_path / "missing.pem")
    path = tmp_path / "key.pem"
    rsa_key = rsa.generate_private_key(public_exponent=65537, key_size=2048).private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    Identity.create(tmp_path / "good.pem")
    truncated = (tmp_path / "good.pem").read_bytes()[:60]
    for content, message in ((b"", "PEM"), (b"garbage", "PEM"), (truncated, "PEM"), (rsa_key, "Ed25519")):
        path.write_bytes(content)
        path.chmod(0o600)
        with pytest.raises(IdentityError, match=message):
            Identity.load(path)


def test_signatures_are_bound_to_signer_purpose_and_payload() -> None:
    alice, bob = Identity.generate(), Identity.generate()
    signature = alice.sign("purpose", b"payload")
    assert bob.verify(alice.peer, "purpose", b"payload", signature)
    assert not bob.verify(bob.peer, "purpose", b"payload", signature)
    assert not bob.verify(alice.peer, "other", b"payload", signature)
    assert not bob.verify(alice.peer, "purpose", b"other", signature)
    assert not bob.verify(alice.peer, "purpose", b"payload", signature[:-1])
    assert not bob.verify(PeerId("not a peer"), "purpose", b"payload", signature)


def test_peer_ids_contain_their_key_and_nothing_else() -> None:
    key = bytes(range(32))
    assert peer_id_of(key).startswith("12D3KooW")
    assert public_key_of(peer_id_of(key)) == key
    for mangled in (
        "",
        "12D3KooW",
        peer_id_of(key)[:-1],
        base58.b58encode(b"\x12\x20" + key).decode(),
        "0OIl",
    ):
        with pytest.raises(ValueError):
            public_key_of(PeerId(mangled))


@pytest.mark.parametrize("spelling", ["{} ", "{}\n", "{}\t \r", " {}", "1{}"])
def test_a_key_has_one_name(spelling: str) -> None:
    """The decoder of base58 is lenient about spaces at the end; whoever has two names has two votes."""
    identity = Identity.generate()
    signature = identity.sign("test", b"x")
    assert identity.verify(identity.peer, "test", b"x", signature)
    other = PeerId(spelling.format(identity.peer))
    assert not identity.verify(other, "test", b"x", signature)
    with pytest.raises(ValueError):
        public_key_of(other)
