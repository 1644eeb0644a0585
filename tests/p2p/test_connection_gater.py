"""What is told of those who are turned away, however many they are."""

from __future__ import annotations

import logging

import pytest
import trio
import trio.testing

from p2p.connection_gater import DETAIL_CHARS_MAX, LOG_PAUSE_S, ConnectionGater
from p2p.transport import PeerId


def test_no_list_means_everybody() -> None:
    assert ConnectionGater().allows(PeerId("anybody"))
    listed = ConnectionGater([PeerId("friend")])
    assert listed.allows(PeerId("friend"))
    assert not listed.allows(PeerId("anybody"))


async def test_strangers_cannot_fill_the_log(
    autojump_clock: trio.testing.MockClock, caplog: pytest.LogCaptureFixture
) -> None:
    gater = ConnectionGater()
    with caplog.at_level(logging.INFO):
        for number in range(500):
            gater.refuse("swarm-key", f"stranger {number} " + "x" * 1000)
        gater.refuse("not-allowed", "somebody")
        assert [record.levelname for record in caplog.records] == ["WARNING", "WARNING"]
        assert "stranger 0" in caplog.text
        await trio.sleep(LOG_PAUSE_S)
        gater.refuse("swarm-key", "stranger 500")
    assert len(caplog.records) == 3
    assert "499 more" in caplog.records[-1].getMessage()
    assert max(len(record.getMessage()) for record in caplog.records) < DETAIL_CHARS_MAX + 100
    assert gater.refusals == {"swarm-key": 501, "not-allowed": 1}
