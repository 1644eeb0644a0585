"""Private swarms from the command line: where the key comes from, where it lies, and where it is never shown."""

from __future__ import annotations

import io
import json
import stat
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest

from cli import node_commands
from cli.checks import registry
from cli.exit_codes import ExitCode
from node.home import Home
from p2p.identity import Identity
from p2p.invite import Invite
from p2p.swarm_key import SwarmKey
from tests.cli.conftest import Gossamer
from tests.cli.fake_node import FakeNode, status_of

RUN = bytes(range(32))
KEY, OTHER = SwarmKey(b"k" * 32), SwarmKey(b"o" * 32)
PEER = Identity.generate().peer
SOON, LONG_AGO = 4_000_000_000, 1_000_000_000


def invite(key: SwarmKey | None = KEY, expires_unix_s: int = SOON) -> str:
    addresses = (f"/ip4/127.0.0.1/tcp/1/p2p/{PEER}",)
    return Invite(run=RUN, addresses=addresses, swarm_key=key, expires_unix_s=expires_unix_s).format()


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """What nodes were started with; none is."""
    started: list[dict[str, Any]] = []

    def live(common: object, home: Home, config: object, **given: Any) -> None:
        started.append(given | {"config": config, "key": SwarmKey.load(home.swarm_key_file(RUN))})

    monkeypatch.setattr(node_commands, "_live", live)
    return started


def shown_nowhere(*keys: SwarmKey, text: str) -> bool:
    return not any(form in text for key in keys for form in (key.text, key.secret.hex()))


def test_an_invite_brings_the_key_and_it_is_kept_for_its_owner_alone(
    gossamer: Gossamer, home: Home, ran: list[dict[str, Any]]
) -> None:
    joined = gossamer("join", invite())
    assert joined.code == ExitCode.OK, joined.err
    file = home.swarm_key_file(RUN)
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert stat.S_IMODE(file.parent.stat().st_mode) == 0o700
    assert str(file) in joined.err
    assert "secret" in joined.err
    assert ran[0]["key"] == KEY
    # Again, then with a new key, then with an invite that lost it.
    assert "the one in the invite" in gossamer("join", invite()).err
    assert "in place of another" in gossamer("join", invite(OTHER)).err
    assert "the invite has none" in gossamer("join", invite(None)).err
    assert [each["key"] for each in ran] == [KEY, KEY, OTHER, OTHER]
    assert shown_nowhere(KEY, OTHER, text=joined.err + joined.out)


def test_an_invite_is_read_from_standard_input_where_nobody_else_sees_it(
    gossamer: Gossamer, home: Home, ran: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO(invite() + "\n"))
    assert gossamer("join", "-").code == ExitCode.OK
    assert SwarmKey.load(home.swarm_key_file(RUN)) == KEY


def test_a_key_that_others_can_read_starts_nothing(
    gossamer: Gossamer, home: Home, ran: list[dict[str, Any]]
) -> None:
    gossamer("join", invite())
    home.swarm_key_file(RUN).chmod(0o644)
    refused = gossamer("join", invite())
    assert (refused.code, "chmod 600" in refused.err) == (ExitCode.CONFIG, True)
    assert len(ran) == 1


@pytest.mark.parametrize(
    ("line", "said", "typed"),
    [
        (invite(expires_unix_s=LONG_AGO), "expired on 2001-09-09 01:46 UTC", "gossamer invite"),
        (invite()[:-20], "cut off", "gossamer invite"),
        (invite().replace(KEY.text, OTHER.text), "mistyped", "gossamer invite"),
        (invite().replace("secret=", "secret=a"), "mistyped", "gossamer invite"),
        (invite() + " ", "", ""),
    ],
)
def test_an_invite_that_is_of_no_use_is_explained_in_one_line_each(
    gossamer: Gossamer, home: Home, ran: list[dict[str, Any]], line: str, said: str, typed: str
) -> None:
    refused = gossamer("join", line)
    if not said:
        assert refused.code == ExitCode.OK
        return
    assert refused.code == ExitCode.USAGE
    what, why, fix = refused.err.splitlines()
    assert (what.startswith("error "), said in what) == (True, True)
    assert why.startswith("why ")
    assert typed in fix
    assert shown_nowhere(KEY, OTHER, text=refused.err)
    assert not home.swarm_key_file(RUN).exists()
    assert ran == []


def test_a_run_is_made_private_once(gossamer: Gossamer, home: Home, ran: list[dict[str, Any]]) -> None:
    gossamer("init")
    first = gossamer("run", "--run", RUN.hex(), "--private")
    assert "gossamer invite" in first.err
    assert stat.S_IMODE(home.swarm_key_file(RUN).stat().st_mode) == 0o600
    again = gossamer("run", "--run", RUN.hex(), "--private")
    assert "new" not in again.err
    assert ran[0]["key"] == ran[1]["key"] is not None
    home.remember_run(RUN)
    assert json.loads(gossamer("config", "paths", "--json").out)["swarm key"] == str(home.swarm_key_file(RUN))


def test_whom_to_allow_is_a_setting_and_an_option(
    gossamer: Gossamer, home: Home, ran: list[dict[str, Any]]
) -> None:
    gossamer("init")
    home.config_file.write_text(f'allow = ["{PEER}"]\n')
    friend = Identity.generate().peer
    gossamer("run", "--run", RUN.hex())
    gossamer("run", "--run", RUN.hex(), "--allow", friend)
    assert [each["config"].allow for each in ran] == [(PEER,), (friend,)]
    wrong = gossamer("run", "--run", RUN.hex(), "--allow", "somebody")
    assert (wrong.code, "gossamer keys show" in wrong.err) == (ExitCode.CONFIG, True)


def test_the_commands_say_that_an_invite_is_a_secret(gossamer: Gossamer, node: FakeNode) -> None:
    for private in (False, True):
        node.status = status_of(0, private=private)
        told = gossamer("invite")
        assert told.out.startswith("gossamer:join/1/")
        assert ("secret" in told.err) == private
        assert "expires  2030-03-17 17:46 UTC" in told.err
        assert ("private" in gossamer("status").out) == private
    assert "expires  never" in gossamer("invite", "--expires", "never").err
    assert [request.expires_s for request in node.asked] == [7 * 86400, 7 * 86400, None]


def test_a_bundle_and_the_settings_never_hold_the_secret(
    gossamer: Gossamer, home: Home, ran: list[dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checks = ("key", "settings", "peers", "node")
    monkeypatch.setattr(registry, "CHECKS", {name: registry.CHECKS[name] for name in checks})
    line = invite(OTHER)
    gossamer("join", invite())
    home.remember_run(RUN)
    log = home.logs_folder / "node.log"
    log.write_text(
        f"somebody ran: gossamer join '{line}'\n" + json.dumps({"event": line, "secret": KEY.text}) + "\n"
    )
    told = gossamer("doctor", line, "--bundle", str(tmp_path / "report.zip"))
    with zipfile.ZipFile(tmp_path / "report.zip") as archive:
        held = {name: archive.read(name).decode() for name in archive.namelist()}
    assert "logs/node.log" in held
    shown = [gossamer("config", "show"), gossamer("config", "paths"), gossamer("config", "show", "--json")]
    said = "".join([*held.values(), told.out, told.err, *(each.out + each.err for each in shown)])
    assert shown_nowhere(KEY, OTHER, text=said)
    assert str(home.swarm_key_file(RUN)) in held["findings.json"]
