"""A private swarm of real processes: who was invited is in it, who was not is told why, and no log has the key."""

from __future__ import annotations

from pathlib import Path

import pytest

from p2p.swarm_key import SwarmKey
from tests.process.single_node import SingleNode
from tests.process.swarm import SPEC, gossamer, until
from training.run_spec import load_run_spec, run_id


@pytest.mark.process
@pytest.mark.slow
@pytest.mark.timeout(240)
async def test_who_was_invited_is_in_and_who_was_not_is_told(tmp_path: Path) -> None:
    spec_file = tmp_path / "run.toml"
    spec_file.write_text(SPEC.format(steps=100_000, merges=1))
    run = run_id(load_run_spec(spec_file))
    first, guest, stranger = (SingleNode(tmp_path, name) for name in ("first", "guest", "stranger"))
    here = ("--listen", "/ip4/127.0.0.1/tcp/0", "--threads", "1")
    with first.running("--run", str(spec_file), "--private", *here):
        (begun,) = await until([first], lambda statuses: True, seconds=90)
        invited = gossamer("invite", "--home", first.home.data_folder)
        line, address = invited.stdout.strip(), begun.addresses[0]
        assert "secret" in invited.stderr
        with (
            guest.running(line, *here, verb="join"),
            stranger.running("--run", str(spec_file), "--bootstrap", address, *here),
        ):
            inside = await until(
                [first, guest],
                lambda statuses: all(any(peer.connected for peer in each.peers) for each in statuses),
                seconds=120,
            )
            (outside,) = await until([stranger], lambda statuses: bool(statuses[0].problem), seconds=60)
            (host,) = await until([first], lambda statuses: bool(statuses[0].refusals), seconds=10)
    assert [status.private for status in inside] == [True, True]
    assert (outside.private, outside.peers) == (False, [])
    assert "gossamer join 'INVITE'" in outside.problem
    assert set(host.refusals) == {"swarm-key"}
    key = SwarmKey.load(guest.home.swarm_key_file(run))
    assert key == SwarmKey.load(first.home.swarm_key_file(run)) is not None
    assert f"secret={key.text}&" in line
    for node in (first, guest, stranger):
        log = (node.home.logs_folder / "node.log").read_text()
        assert key.text not in log
        assert key.secret.hex() not in log
        told = "swarm-key: refused who dialled" if node is first else "swarm-key at a peer"
        assert (told in log) == (node is not guest)
