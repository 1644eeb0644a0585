"""An invite survives copying, and damage is told apart."""

from __future__ import annotations

import contextlib
import zlib
from urllib.parse import quote

import pytest
from hypothesis import given
from hypothesis import strategies as st

from p2p.errors import InviteError
from p2p.identity import peer_id_of
from p2p.invite import EXPIRES_UNIX_S_MAX, INVITE_CHARS_MAX, PEERS_MAX, Invite
from p2p.swarm_key import SwarmKey

PEERS = [peer_id_of(bytes([number]) * 32) for number in range(PEERS_MAX)]
INVITES = st.builds(
    Invite,
    run=st.binary(min_size=32, max_size=32),
    addresses=st.lists(
        st.sampled_from([f"/ip4/192.0.2.{n}/tcp/4100/p2p/{peer}" for n, peer in enumerate(PEERS)]),
        min_size=1,
        max_size=PEERS_MAX,
    ).map(tuple),
    swarm_key=st.none() | st.binary(min_size=32, max_size=32).map(SwarmKey),
    expires_unix_s=st.none() | st.integers(1, EXPIRES_UNIX_S_MAX),
)
INVITE = Invite(
    run=bytes(range(32)),
    addresses=(f"/ip4/192.0.2.7/tcp/4100/p2p/{PEERS[0]}", f"/ip6/2001:db8::1/tcp/4100/p2p/{PEERS[1]}"),
    swarm_key=SwarmKey(bytes(range(100, 132))),
    expires_unix_s=2_000_000_000,
)


@given(INVITES)
def test_an_invite_reads_as_it_was_written(invite: Invite) -> None:
    line = invite.format()
    assert len(line) <= INVITE_CHARS_MAX
    assert line.isascii()
    assert line.isprintable()
    assert " " not in line
    assert Invite.parse(f"  {line}\n", now_unix_s=0) == invite


def test_peers_for_whom_there_is_no_room_are_left_out() -> None:
    longest = [
        f"/ip6/2001:db8:1111:2222:3333:4444:5555:{n:04x}/tcp/65535/p2p/{p}" for n, p in enumerate(PEERS)
    ]
    invite = Invite(run=bytes(32), addresses=tuple(longest), expires_unix_s=2_000_000_000)
    line = invite.format()
    assert INVITE_CHARS_MAX - len("&peer=" + longest[-1]) < len(line) <= INVITE_CHARS_MAX
    named = Invite.parse(line, now_unix_s=0)
    assert named.addresses == invite.addresses[: len(named.addresses)]
    assert named.expires_unix_s == invite.expires_unix_s


@given(INVITES, st.data())
def test_one_wrong_character_is_noticed(invite: Invite, data: st.DataObject) -> None:
    line = invite.format()
    at = data.draw(st.integers(0, len(line) - 1))
    wrong = data.draw(
        st.sampled_from("abcdefghijklmnopqrstuvwxyz0123456789&=?/%").filter(lambda c: c != line[at])
    )
    with pytest.raises(InviteError):
        Invite.parse(line[:at] + wrong + line[at + 1 :], now_unix_s=0)


@given(INVITES, st.integers(1, 200))
def test_a_lost_end_is_noticed(invite: Invite, lost: int) -> None:
    with pytest.raises(InviteError):
        Invite.parse(invite.format()[:-lost], now_unix_s=0)


@pytest.mark.parametrize(
    ("mangle", "complaint"),
    [
        (lambda line: "", "not an invite"),
        (lambda line: "https://example.org/", "not an invite"),
        (lambda line: line[:-20], "cut off"),
        (lambda line: line[:100], "cut off"),
        (lambda line: line[:60] + " " + line[60:], "one line"),
        (lambda line: line + "x" * 1000, "one line"),
        (lambda line: line.replace("tcp/4100", "tcp/4101", 1), "mistyped"),
        (lambda line: line.replace("join/1/", "join/2/"), "version 2"),
    ],
)
def test_the_error_says_what_is_wrong(mangle, complaint: str) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(InviteError, match=complaint) as refused:
        Invite.parse(mangle(INVITE.format()), now_unix_s=0)
    assert refused.value.why
    assert refused.value.fix


def forged(body: str) -> str:
    """``body`` with a checksum that fits, as who means to would write it."""
    return f"{body}&check={zlib.crc32(body.encode()):08x}"


@given(st.text(max_size=80) | st.text("abcdefghijklmnopqrstuvwxyz234567", min_size=50, max_size=54))
def test_a_secret_that_is_no_key_is_refused_and_not_repeated(secret: str) -> None:
    body = INVITE.format().rpartition("&check=")[0]
    key = INVITE.swarm_key.text if INVITE.swarm_key else ""
    line = forged(body.replace(key, quote(secret, safe="")))
    said = ""
    try:
        parsed = Invite.parse(line, now_unix_s=0)
        assert parsed.swarm_key is not None
        assert parsed.swarm_key.text == secret
    except InviteError as error:
        said = f"{error} {error.why} {error.fix}"
    assert len(secret) < 9 or secret not in said


@given(st.text(max_size=200), st.text(max_size=200))
def test_whatever_is_written_for_an_invite_is_parsed_or_refused(run: str, query: str) -> None:
    for text in (
        query,
        forged(f"gossamer:join/1/{run}?{query}"),
        forged(f"gossamer:join/1/{'a' * 52}?{query}"),
    ):
        with contextlib.suppress(InviteError):
            invite = Invite.parse(text, now_unix_s=0)
            assert invite.format() == text.strip()


@pytest.mark.parametrize("extra", ["&secret=" + "a" * 52, "&expires=1", "&colour=red"])
def test_an_invite_says_nothing_twice_and_nothing_new(extra: str) -> None:
    body = INVITE.format().rpartition("&check=")[0]
    with pytest.raises(InviteError, match="not valid"):
        Invite.parse(forged(body + extra), now_unix_s=0)


def test_an_invite_does_not_show_its_secret_by_accident() -> None:
    assert INVITE.swarm_key is not None
    for shown in (repr(INVITE), str(INVITE), f"{INVITE.swarm_key}"):
        assert INVITE.swarm_key.text not in shown
        assert INVITE.swarm_key.secret.hex() not in shown


def test_an_expired_invite_is_refused_from_that_second_on() -> None:
    line = INVITE.format()
    assert Invite.parse(line, now_unix_s=1_999_999_999) == INVITE
    with pytest.raises(InviteError, match="expired on 2033-05-18 03:33 UTC"):
        Invite.parse(line, now_unix_s=2_000_000_000)


@pytest.mark.parametrize(
    "wrong",
    [
        {"run": b"short"},
        {"addresses": ()},
        {"addresses": ("/ip4/192.0.2.7/tcp/4100",)},
        {"addresses": INVITE.addresses * 5},
        {"expires_unix_s": -1},
        {"expires_unix_s": EXPIRES_UNIX_S_MAX + 1},
        {"addresses": (f"/dns/{'x' * 1000}/tcp/4100/p2p/{PEERS[0]}",)},
    ],
)
def test_an_invite_that_could_not_be_used_cannot_be_made(wrong: dict[str, object]) -> None:
    fields = {name: getattr(INVITE, name) for name in ("run", "addresses", "swarm_key", "expires_unix_s")}
    with pytest.raises(ValueError):
        Invite(**{**fields, **wrong})
