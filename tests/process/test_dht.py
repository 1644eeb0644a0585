"""Joining by a run's id, in processes of their own: one address is known, and it is of somebody in another run."""

from __future__ import annotations

from pathlib import Path

import pytest

from cli.node_process import free_ports
from tests.process.single_node import SingleNode, running
from tests.process.swarm import SPEC, until
from training.run_spec import load_run_spec, run_id


@pytest.mark.process
@pytest.mark.slow
@pytest.mark.timeout(300)
async def test_a_run_is_joined_by_its_id_through_a_node_of_another_run(tmp_path: Path) -> None:
    specs = [tmp_path / "theirs.toml", tmp_path / "ours.toml"]
    for steps, file in zip((100, 200), specs, strict=True):
        file.write_text(SPEC.format(steps=steps, merges=1))
    run = run_id(load_run_spec(specs[1])).hex()
    gate, member, newcomer = (SingleNode(tmp_path, name) for name in ("gate", "member", "newcomer"))
    place = [f"/ip4/127.0.0.1/tcp/{port}" for port in free_ports(3)]
    known = f"{place[0]}/p2p/{gate.peer}"
    join = ["-m", "cli", "join", "--home", str(newcomer.home.data_folder), "--bootstrap-only", run]
    with (
        gate.running("--bootstrap-only", "--run", str(specs[0]), "--listen", place[0]),
        member.running(
            "--bootstrap-only", "--run", str(specs[1]), "--listen", place[1], "--bootstrap", known
        ),
    ):
        await until([gate, member], lambda statuses: True, seconds=60)
        with running([*join, "--listen", place[2], "--bootstrap", known], tmp_path / "join.log") as process:
            newcomer.process = process
            (status,) = await until([newcomer], lambda statuses: not statuses[0].problem, seconds=60)
        assert status.run_id == run
        assert status.refusals.get("wrong-run", 0) <= 2
