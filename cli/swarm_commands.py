"""``gossamer swarms`` and ``gossamer advertise``: lists of swarms that anybody may join, and how one gets on them.

Owns reading a list from a file, a URL or a peer, within bounds of size and time, and how lists look. A list is hints
from whoever keeps it; what is on it is signed by the members themselves (``p2p.advert``). A peer is asked under a key
made for the occasion.
"""

from __future__ import annotations

import contextlib
import datetime
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from cli.common import Common, command
from p2p.errors import AdvertError

if TYPE_CHECKING:
    from p2p.advert import Advert, Unusable

FETCH_S_MAX = 15.0
PEER_PREFIXES = ("/ip4/", "/ip6/", "/dns/", "/dns4/", "/dns6/")
"""Of an address; whatever else has no scheme is a file."""
EXPIRES_DEFAULT = "30d"

From = Annotated[
    list[str] | None,
    typer.Option(
        "--from",
        metavar="ADDR|FILE|URL",
        help="Any peer's address, or a list of swarms, instead of the node here and the lists in config.toml.",
    ),
]


def register(app: typer.Typer) -> None:
    """Add this module's commands to ``app``."""
    command(app, "swarms", rich_help_panel="Take part")(swarms)
    command(app, "advertise", rich_help_panel="Ask a running node")(advertise)


def swarms(common: Common, source: From = None) -> None:
    """List the swarms that anybody may join: gossamer join NAME"""
    from cli.views import one_line

    adverts, unusable = look_up(common, source)
    for origin, each in unusable:
        skipped = f"skipped   {origin}, line {each.line}: {one_line(each.why)}"
        common.err().print(skipped, markup=False, soft_wrap=True)
    if common.json:
        for advert in adverts:
            common.print(advert, "")
        return
    common.print(adverts, swarms_table(adverts) if adverts else "no swarm is told of")


def advertise(
    common: Common,
    about: Annotated[
        str, typer.Option("--about", metavar="TEXT", help="What it is for, in a sentence.")
    ] = "",
    expires: Annotated[str, typer.Option("--expires", help="For example 12h or 30d.")] = EXPIRES_DEFAULT,
) -> None:
    """Print a signed line about the swarm of the node that runs here, for a list of swarms."""
    from cli.ask_commands import parse_duration_s
    from node.control import MakeAdvert

    answer: dict[str, Any] = common.ask(
        "advert", MakeAdvert(about=about, expires_s=parse_duration_s(expires))
    )
    common.print(answer, escape(answer["advert"]))
    common.err().print("next      add the line to a list, a file or a web page: gossamer swarms --from LIST")


def find(common: Common, name: str, source: Sequence[str] | None = None) -> tuple[bytes, list[str]]:
    """The run called ``name`` and addresses of its members. Raises AdvertError."""
    from p2p.advert import chosen_by_name

    adverts, _ = look_up(common, source)
    named = chosen_by_name(adverts, name)
    addresses = dict.fromkeys(address for advert in named for address in advert.claim.addresses)
    return bytes.fromhex(named[0].claim.run), list(addresses)


def look_up(common: Common, source: Sequence[str] | None) -> tuple[list[Advert], list[tuple[str, Unusable]]]:
    """What is on the lists named, or else on those of the settings and with the node here. Raises AdvertError."""
    from node.config import load_config
    from node.control import NoDaemon
    from p2p.advert import read_list

    named = source or load_config(common.home.config_file, os.environ).config.swarms
    lists = {origin: _read(origin) for origin in named}
    if not source:
        with contextlib.suppress(NoDaemon):
            lists["the node here"] = "\n".join(common.ask("adverts")["adverts"]).encode()
    if not lists:
        raise AdvertError(
            "no list of swarms is known",
            why="there is no central one: peers tell each other, and anybody may keep a list, a file or a web page",
            fix="ask any peer that you know, or name a list: gossamer swarms --from ADDR|FILE|URL",
        )
    now_unix_s = datetime.datetime.now(datetime.UTC).timestamp()
    adverts: dict[tuple[str, str], Advert] = {}
    unusable: list[tuple[str, Unusable]] = []
    for origin, data in lists.items():
        found, others = read_list(data, now_unix_s, origin=origin)
        adverts |= {(advert.claim.run, advert.peer): advert for advert in found}
        unusable += [(origin, each) for each in others]
    return sorted(adverts.values(), key=lambda advert: (advert.claim.name, advert.claim.run)), unusable


def swarms_table(adverts: Sequence[Advert]) -> Table:
    """One row for each."""
    from cli.views import one_line, short
    from p2p.invite import utc_text

    table = Table(box=None, pad_edge=False, header_style="bold")
    for title in ("name", "run", "parameters", "by", "until", "about"):
        table.add_column(title, justify="right" if title == "parameters" else "left")
    for advert in adverts:
        claim = advert.claim
        table.add_row(
            claim.name,
            claim.run[:16],
            f"{claim.parameters:,}",
            short(advert.peer),
            utc_text(claim.expires_unix_s),
            Text(one_line(claim.about)),
        )
    return table


def _read(origin: str) -> bytes:
    """Raises AdvertError."""
    from urllib.request import urlopen

    from p2p.advert import LIST_BYTES_MAX

    if origin.startswith(PEER_PREFIXES):
        return _ask_peer(origin)
    try:
        if "://" not in origin:
            with Path(origin).expanduser().open("rb") as file:
                return file.read(LIST_BYTES_MAX + 1)
        if not origin.startswith(("https://", "http://")):
            raise ValueError("only http and https are read")
        with urlopen(origin, timeout=FETCH_S_MAX) as answer:  # noqa: S310 - the scheme was looked at
            return bytes(answer.read(LIST_BYTES_MAX + 1))
    except (OSError, ValueError) as error:  # a URLError is an OSError
        why = getattr(error, "reason", None) or getattr(error, "strerror", None) or error
        raise AdvertError(
            f"the list of swarms at {origin} cannot be read: {why}",
            why="which swarms there are is only known from lists",
            fix="name another list: gossamer swarms --from FILE|URL    or join by an invite",
        ) from error


def _ask_peer(address: str) -> bytes:
    """The adverts that the peer at ``address`` tells, as a list. Raises AddressError or AdvertError."""
    import trio

    from cli.views import one_line
    from gossip.address_book import parse_peer_address
    from gossip.adverts import fetch_adverts
    from p2p.errors import MalformedMessage, TransportError
    from p2p.identity import Identity
    from p2p.libp2p_transport import open_libp2p
    from p2p.limits import DEFAULT_LIMITS
    from p2p.transport import PeerRecord

    peer, where = parse_peer_address(address, chars_max=DEFAULT_LIMITS.address_chars_max)

    async def ask() -> list[bytes]:
        async with open_libp2p(Identity.generate(), listen=[]) as transport:
            await transport.connect(PeerRecord(peer, (where,)))
            return await fetch_adverts(transport, peer)

    try:
        return b"\n".join(trio.run(ask))
    except (MalformedMessage, TransportError) as error:
        raise AdvertError(
            f"{peer} did not tell which swarms it knows of: {one_line(error.what)}",
            why="peers tell that take part in the hash table, or advertise their own swarm",
            fix="ask another peer: gossamer swarms --from ADDR    or name a list: gossamer swarms --from FILE|URL",
        ) from error
