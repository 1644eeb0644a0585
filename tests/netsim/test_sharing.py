"""Bodies are decoded once in a world, and by nobody else's decoder outside of it."""

import pytest

from gossip import notices
from gossip.messages import Heartbeat
from netsim.sharing import notices_worked_out_once
from p2p.codec import decode, encode
from p2p.errors import MalformedMessage
from tests.gossip.world import heartbeat


def test_equal_bodies_are_one_object_within_and_two_outside() -> None:
    data = encode(heartbeat(step=7))

    def two() -> list[Heartbeat]:
        decoder = vars(notices)["decode"]
        return [decoder(bytes(bytearray(data)), Heartbeat, bytes_max=1000) for _ in range(2)]

    with notices_worked_out_once():
        first, second = two()
        assert first is second
        assert first == heartbeat(step=7)
        with pytest.raises(MalformedMessage):
            vars(notices)["decode"](data + b"\0", Heartbeat, bytes_max=1000)
    first, second = two()
    assert first is not second
    assert vars(notices)["decode"] is decode
