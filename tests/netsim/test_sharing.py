"""Notices are opened once in a world, and by nobody else's rules outside of it."""

import pytest

from gossip import notices
from netsim.sharing import notices_worked_out_once
from p2p.errors import MalformedMessage
from tests.gossip.world import IDENTITIES, notice_bytes


def test_equal_notices_are_one_object_within_and_two_outside() -> None:
    data = notice_bytes(IDENTITIES[0], step=7)

    def two() -> list[notices._Register]:
        return [notices._read(notices._open(bytes(bytearray(data)))) for _ in range(2)]

    honest = notices._open
    with notices_worked_out_once():
        first, second = two()
        assert first is second
        with pytest.raises(MalformedMessage):
            notices._open(data + b"\0")
    third, fourth = two()
    assert third is not fourth
    assert third == fourth == first
    assert notices._open is honest
