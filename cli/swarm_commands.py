"""``gossamer swarms`` and ``gossamer advertise``: lists of swarms that anybody may join, and how one gets on them.

Owns reading a list from a file or a URL, within bounds of size and time, and how lists look. A list is hints from
whoever keeps it; what is on it is signed by the members themselves (``p2p.advert``).
"""

from __future__ import annotations

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
EXPIRES_DEFAULT = "30d"

From = Annotated[
    list[str] | None,
    typer.Option("--from", metavar="FILE|URL", help="A list of swarms, instead of those in config.toml."),
]


def register(app: typer.Typer) -> None:
    """Add this module's commands to ``app``."""
    command(app, "swarms", rich_help_panel="Take part")(swarms)
    command(app, "advertise", rich_help_panel="Ask a running node")(advertise)


def swarms(common: Common, source: From = None) -> None:
    """List the swarms that anybody may join: gossamer join NAME"""
    adverts, unusable = look_up(common, source)
    for origin, each in unusable:
        common.err().print(f"skipped   {origin}, line {each.line}: {each.why}", markup=False, soft_wrap=True)
    if common.json:
        for advert in adverts:
            common.print(advert, "")
        return
    common.print(adverts, swarms_table(adverts) if adverts else "no swarm is on the lists")


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
    """What is on the lists named, or else on those of the settings. Raises AdvertError."""
    from node.config import load_config
    from p2p.advert import read_list

    named = source or load_config(common.home.config_file, os.environ).config.swarms
    if not named:
        raise AdvertError(
            "no list of swarms is known",
            why="there is no central one: anybody may keep a list, as a file or on the web",
            fix='gossamer swarms --from FILE|URL    or set swarms = ["https://..."] in config.toml',
        )
    now_unix_s = datetime.datetime.now(datetime.UTC).timestamp()
    adverts: dict[tuple[str, str], Advert] = {}
    unusable: list[tuple[str, Unusable]] = []
    for origin in named:
        found, others = read_list(_read(origin), now_unix_s, origin=origin)
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
