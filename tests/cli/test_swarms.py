"""Lists of swarms: where they are read from, how they look, how one gets on them, and joining by name."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest

from cli import node_commands
from cli.exit_codes import ExitCode
from node.control import MakeAdvert
from node.home import Home
from p2p.advert import Claim, sign_advert
from p2p.identity import Identity
from tests.cli.conftest import Gossamer
from tests.cli.fake_node import FakeNode

ALICE, BOB = Identity.generate(), Identity.generate()
RUN, OTHER = "ab" * 32, "cd" * 32
SOON, LONG_AGO = 4_000_000_000, 1_000_000_000


def line(name: str, run: str, signer: Identity = ALICE, expires_unix_s: int = SOON) -> str:
    claim = Claim(
        name=name,
        about="learns \x1b[31mPython",
        run=run,
        parameters=1_550_160,
        addresses=[f"/ip4/45.1.0.7/tcp/4100/p2p/{signer.peer}"],
        expires_unix_s=expires_unix_s,
    )
    return sign_advert(signer, claim).line()


@pytest.fixture
def listed(tmp_path: Path) -> Path:
    """A list with two members of one swarm, another swarm, and two lines that are of no use."""
    file = tmp_path / "swarms.jsonl"
    lines = [
        line("stdlib", RUN),
        line("stdlib", RUN, BOB),
        line("digits", OTHER),
        line("old", RUN, expires_unix_s=LONG_AGO),
        '{"\\u001b[31m": 1}',
    ]
    file.write_text("\n".join(lines))
    return file


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """What nodes were started with; none is."""
    started: list[dict[str, Any]] = []
    monkeypatch.setattr(node_commands, "_live", lambda common, home, config, **given: started.append(given))
    return started


@contextmanager
def web(answer: bytes, status: int = 200) -> Iterator[str]:
    """A page on a server of its own."""

    class Page(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(status)
            self.end_headers()
            self.wfile.write(answer)

        def log_message(self, *_: object) -> None:
            """Nothing."""

    with HTTPServer(("127.0.0.1", 0), Page) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/swarms.jsonl"
        server.shutdown()


def test_what_is_on_a_list_is_shown_and_what_is_of_no_use_is_told(gossamer: Gossamer, listed: Path) -> None:
    shown = gossamer("swarms", "--from", str(listed))
    assert shown.code == ExitCode.OK, shown.err
    assert [row.split()[0] for row in shown.out.splitlines()] == ["name", "digits", "stdlib", "stdlib"]
    assert "1,550,160" in shown.out
    assert "\x1b" not in shown.out + shown.err
    assert "line 4: it has expired" in shown.err
    assert "line 5: " in shown.err
    told = [json.loads(row) for row in gossamer("swarms", "--from", str(listed), "--json").out.splitlines()]
    assert [each["claim"]["run"] for each in told] == [OTHER, RUN, RUN]


def test_a_list_may_be_on_the_web_and_several_are_one(
    gossamer: Gossamer, listed: Path, tmp_path: Path
) -> None:
    more = tmp_path / "more.jsonl"
    more.write_text(line("third", "ef" * 32))
    with web(listed.read_bytes()) as url:
        shown = gossamer("swarms", "--from", url, "--from", str(more), "--from", str(listed))
    assert [row.split()[0] for row in shown.out.splitlines()[1:]] == ["digits", "stdlib", "stdlib", "third"]
    with web(b"", status=404) as url:
        refused = gossamer("swarms", "--from", url)
    assert (refused.code, "Not Found" in refused.err) == (ExitCode.USAGE, True)


@pytest.mark.parametrize(
    ("source", "why"),
    [
        ([], "no list of swarms is known"),
        (["--from", "missing.jsonl"], "No such file"),
        (["--from", "ftp://example.org/list"], "only http and https"),
        (["--from", "http://127.0.0.1:1/list"], "refused"),
        (["--from", f"/ip4/127.0.0.1/tcp/1/p2p/{ALICE.peer}"], "did not tell which swarms it knows of"),
    ],
)
def test_where_there_is_no_list_it_is_said(gossamer: Gossamer, source: list[str], why: str) -> None:
    refused = gossamer("swarms", *source)
    assert refused.code == ExitCode.USAGE
    assert why in refused.err
    assert "gossamer swarms --from " in refused.err


def test_a_swarm_is_joined_by_its_name(
    gossamer: Gossamer, home: Home, listed: Path, ran: list[dict[str, Any]]
) -> None:
    home.create()
    home.config_file.write_text(f'swarms = ["{listed}"]\n')
    joined = gossamer("join", "stdlib")
    assert joined.code == ExitCode.OK, joined.err
    (given,) = ran
    assert given["run"].hex() == RUN
    assert given["bootstrap"] == [f"/ip4/45.1.0.7/tcp/4100/p2p/{each.peer}" for each in (ALICE, BOB)]
    refused = gossamer("join", "nothing")
    assert (refused.code, "no swarm called nothing" in refused.err) == (ExitCode.USAGE, True)
    assert len(gossamer("swarms").out.splitlines()) == 4
    assert gossamer("join", "digits", "--from", str(listed)).code == ExitCode.OK


def test_a_name_that_two_swarms_have_is_not_chosen_for_anybody(
    gossamer: Gossamer, tmp_path: Path, ran: list[dict[str, Any]]
) -> None:
    file = tmp_path / "two.jsonl"
    file.write_text(line("stdlib", RUN) + "\n" + line("stdlib", OTHER, BOB))
    refused = gossamer("join", "stdlib", "--from", str(file))
    assert (refused.code, "2 swarms are called stdlib" in refused.err) == (ExitCode.USAGE, True)
    assert ran == []


def test_the_node_here_is_asked_as_well_as_the_lists(
    gossamer: Gossamer, home: Home, node: FakeNode, listed: Path, ran: list[dict[str, Any]]
) -> None:
    assert "no swarm" in gossamer("swarms").out
    node.adverts = [line("heard-of", "ef" * 32), line("stdlib", RUN)]
    assert [row.split()[0] for row in gossamer("swarms").out.splitlines()[1:]] == ["heard-of", "stdlib"]
    home.config_file.write_text(f'swarms = ["{listed}"]\n')
    names = [row.split()[0] for row in gossamer("swarms").out.splitlines()[1:]]
    assert names == ["digits", "heard-of", "stdlib", "stdlib"]
    assert gossamer("join", "heard-of").code == ExitCode.OK
    assert ran[0]["run"].hex() == "ef" * 32
    # Who names a list asks that and nobody else.
    assert "heard-of" not in gossamer("swarms", "--from", str(listed)).out


def test_an_address_without_a_peer_is_explained(gossamer: Gossamer) -> None:
    refused = gossamer("swarms", "--from", "/ip4/127.0.0.1/tcp/1")
    assert (refused.code, "does not end in /p2p/" in refused.err) == (ExitCode.CONFIG, True)


def test_a_running_node_advertises_its_swarm(gossamer: Gossamer, node: FakeNode) -> None:
    made = gossamer("advertise", "--about", "for everybody", "--expires", "2d")
    assert made.out.strip() == '{"claim":{"name":"fake"}}'
    assert node.asked == [MakeAdvert(about="for everybody", expires_s=172_800)]
