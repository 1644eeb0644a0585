"""Commands that make this machine a node: init, run, join.

Only ``run`` and ``join`` import torch and libp2p, and only once everything cheap has been checked; a rendezvous
(``--bootstrap-only``) needs no torch.
"""

from __future__ import annotations

import datetime
import os
import re
import signal
import sys
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cli.common import Common, command
from cli.exit_codes import ExitCode
from cli.swarm_commands import From, find
from p2p.errors import InviteError

if TYPE_CHECKING:
    from node.config import NodeConfig
    from node.home import Home
    from p2p.invite import Invite
    from training.run_spec import RunSpec

PARENT_CHECK_S = 0.5
RUN_ID = "[0-9a-f]{64}"
NAME = "[a-z0-9][a-z0-9._-]{0,47}"
"""Of a run: an invite has a colon in it, and an id is longer."""

Listen = Annotated[
    list[str] | None, typer.Option("--listen", metavar="ADDR", help="Listen here; may be repeated.")
]
Bootstrap = Annotated[
    list[str] | None,
    typer.Option(
        "--bootstrap", metavar="ADDR", help="A peer of any run to start from, .../p2p/PEER; may be repeated."
    ),
]
Lan = Annotated[
    bool | None,
    typer.Option("--lan/--no-lan", help="Find members on the local network, and be found there."),
]
Allow = Annotated[
    list[str] | None,
    typer.Option("--allow", metavar="PEER", help="Connect with this peer id and no other; may be repeated."),
]
Private = Annotated[
    bool,
    typer.Option(
        "--private", help="Make a key for the run's swarm if it has none: who lacks it cannot connect."
    ),
]
Dht = Annotated[
    bool | None,
    typer.Option(
        "--dht/--no-dht", help="Be found by the run's id, and find others, through nodes of any run."
    ),
]
Device = Annotated[str | None, typer.Option("--device", help="auto, cpu, cuda, cuda:1 or mps.")]
Threads = Annotated[int | None, typer.Option("--threads", help="Processor threads for training.")]
Data = Annotated[
    str | None,
    typer.Option(
        "--data", metavar="PATH", help="Your own data, for runs that learn from it: text, or an .npz file."
    ),
]
Base = Annotated[
    str | None,
    typer.Option(
        "--base",
        metavar="PATH",
        help="What a one-byte run starts from: weights (safetensors), or a Hugging Face model's directory.",
    ),
]
Part = Annotated[
    str | None, typer.Option("--part", metavar="K/N", help="Train on the k-th of n parts of the data.")
]
Linger = Annotated[
    bool, typer.Option("--linger/--no-linger", help="Stay up after the run's last merge, to serve it.")
]
Metrics = Annotated[
    str | None,
    typer.Option("--metrics-listen", metavar="IP:PORT", help="Serve metrics to Prometheus here."),
]
BootstrapOnly = Annotated[
    bool,
    typer.Option("--bootstrap-only", help="Introduce members to each other; hold no model and be no member."),
]
ParentOption = Annotated[int | None, typer.Option("--parent", hidden=True)]


def register(app: typer.Typer) -> None:
    """Add this module's commands to ``app``."""
    for name, function in [("init", init), ("run", run), ("join", join)]:
        command(app, name, rich_help_panel="Take part")(function)


def init(common: Common) -> None:
    """Create this node's identity and its commented settings file; never touches existing ones."""
    made = prepare_home(common.home)
    home = common.home
    peer, key, config = made
    lines = [
        f"identity  {peer}  {home.identity_file} ({'created, ' if key else 'kept, '}mode 0600: back it up)",
        f"config    {home.config_file} ({'created: defaults, commented' if config else 'kept'})",
        "next      try it on this machine: gossamer testnet up    join others: gossamer join 'INVITE'",
    ]
    result = {
        "peer": peer,
        "identity": str(home.identity_file),
        "config": str(home.config_file),
        "created": {"identity": key, "config": config},
    }
    common.print(result, "\n".join(lines))


def run(
    common: Common,
    spec: Annotated[
        str | None,
        typer.Option("--run", metavar="SPEC.toml|RUN_ID", help="The run; the last one when not given."),
    ] = None,
    listen: Listen = None,
    bootstrap: Bootstrap = None,
    private: Private = False,
    allow: Allow = None,
    lan: Lan = None,
    dht: Dht = None,
    device: Device = None,
    threads: Threads = None,
    data: Data = None,
    base: Base = None,
    part: Part = None,
    metrics_listen: Metrics = None,
    linger: Linger = True,
    bootstrap_only: BootstrapOnly = False,
    parent: ParentOption = None,
) -> None:
    """Run a node: train, exchange, merge, until Ctrl-C (once: checkpoint and goodbye; twice: at once)."""
    from p2p.identity import Identity

    if parent is not None:
        _die_with(parent)
    home = common.home
    learning = {"device": device, "threads": threads, "data_path": data, "base_path": base, "part": part}
    flags = _flags(listen, allow, lan, dht, metrics_listen, learning)
    if bootstrap_only:
        _refuse_for_rendezvous(learning, linger=linger)
    config = _config(common, home, flags)
    run_spec, run_id = _parse_run(spec)
    # Before the seconds that importing torch takes.
    Identity.load(home.identity_file)
    if run_spec is None and run_id is None:
        home.last_run()
    if run_spec is not None and base is not None:
        run_spec = _based_on(run_spec, config)
    if private:
        _make_private(common, run_spec, run_id)
    _live(
        common,
        home,
        config,
        spec=run_spec,
        run=run_id,
        bootstrap=bootstrap or [],
        linger=linger,
        bootstrap_only=bootstrap_only,
    )


def join(
    common: Common,
    invite: Annotated[
        str,
        typer.Argument(
            metavar="INVITE|RUN_ID|NAME",
            help="What a member's `gossamer invite` printed, in quotes, or - to read it from standard input; "
            "the id of a run; or the name of one on a list of swarms.",
        ),
    ],
    listen: Listen = None,
    bootstrap: Bootstrap = None,
    allow: Allow = None,
    lan: Lan = None,
    dht: Dht = None,
    device: Device = None,
    threads: Threads = None,
    data: Data = None,
    base: Base = None,
    part: Part = None,
    metrics_listen: Metrics = None,
    linger: Linger = True,
    bootstrap_only: BootstrapOnly = False,
    source: From = None,
) -> None:
    """Join a swarm by invite, id or name: make an identity if there is none, fetch and check the run spec, run."""
    learning = {"device": device, "threads": threads, "data_path": data, "base_path": base, "part": part}
    flags = _flags(listen, allow, lan, dht, metrics_listen, learning)
    if bootstrap_only:
        _refuse_for_rendezvous(learning, linger=linger)
    listed: list[str] = []
    if re.fullmatch(NAME, invite):
        invited = None
        run_id, listed = find(common, invite, source)
    else:
        invited, run_id = _parse_invite(common, invite)
    addresses = [*(invited.addresses if invited is not None else listed), *(bootstrap or ())]
    home = common.home
    peer, created, _ = prepare_home(home)
    config = _config(common, home, flags)
    if not addresses and not config.lan:
        raise InviteError(
            "a run id alone leads nowhere",
            why="somebody must be known to ask: a node of any run, or the local network",
            fix=f"gossamer join {run_id.hex()} --bootstrap ADDR    or, on the same network: gossamer join RUN_ID --lan",
        )
    err = common.err()
    err.print(f"identity  {peer}{' (new)' if created else ''}")
    err.print(f"run       {run_id.hex()[:16]}, by way of {len(addresses)} address(es)")
    told = None
    if invited is not None:
        with home.lock():
            told = _take_swarm_key(home, invited)
    if told is not None:
        err.print(f"private   {told}", soft_wrap=True)
    _live(
        common,
        home,
        config,
        spec=None,
        run=run_id,
        bootstrap=addresses,
        linger=linger,
        bootstrap_only=bootstrap_only,
    )


def _parse_invite(common: Common, text: str) -> tuple[Invite | None, bytes]:
    """An invite, if it is one, and the id of the run it is to. Raises InviteError."""
    from p2p.invite import INVITE_CHARS_MAX, Invite

    # Whatever is typed on a command line, every user of the machine can read as long as the program runs.
    if text == "-" and sys.stdin.isatty():
        common.err().print("paste the invite:")
    line = sys.stdin.readline(INVITE_CHARS_MAX + 2) if text == "-" else text
    if re.fullmatch(RUN_ID, line.strip()):
        return None, bytes.fromhex(line.strip())
    invite = Invite.parse(line, now_unix_s=datetime.datetime.now(datetime.UTC).timestamp())
    return invite, invite.run


def prepare_home(home: Home) -> tuple[str, bool, bool]:
    """Make what ``home`` lacks; returns the peer id, and whether the key and the settings file are new."""
    from node.config import default_config_text
    from p2p.identity import Identity

    home.create()
    new_key = not home.identity_file.exists()
    identity = Identity.create(home.identity_file) if new_key else Identity.load(home.identity_file)
    new_config = not home.config_file.exists()
    if new_config:
        home.config_file.write_text(default_config_text())
    return identity.peer, new_key, new_config


def _make_private(common: Common, spec: RunSpec | None, run: bytes | None) -> None:
    """Give the run that is to be gone on with a swarm key, unless it has one."""
    from p2p.swarm_key import SwarmKey
    from training.run_spec import run_id

    home = common.home
    run = run_id(spec) if spec is not None else run or home.last_run()
    file = home.swarm_key_file(run)
    with home.lock():
        made = SwarmKey.load(file) is None
        if made:
            SwarmKey.generate().store(file)
    if made:
        common.err().print(f"private   {file} (new, mode 0600)", soft_wrap=True)
        common.err().print("next      let others in, while this node runs: gossamer invite")


def _take_swarm_key(home: Home, invite: Invite) -> str | None:
    """Store the key that ``invite`` brings; returns what there is to say about the swarm's key."""
    from p2p.swarm_key import SwarmKey

    file = home.swarm_key_file(invite.run)
    held = SwarmKey.load(file)
    if invite.swarm_key is None:
        # Never down to an open swarm because a line on the way here lost its key.
        return (
            None if held is None else f"{file} is used, the invite has none; for an open swarm, move it away"
        )
    if held == invite.swarm_key:
        return f"{file} is the one in the invite"
    invite.swarm_key.store(file)
    return f"{file} ({'new' if held is None else 'in place of another'}, mode 0600), from the invite: both are secret"


def _refuse_for_rendezvous(learning: Mapping[str, object], *, linger: bool) -> None:
    """What is about learning has no meaning for a node that does not learn."""
    given = [f"--{key.removesuffix('_path')}" for key, value in learning.items() if value is not None]
    if not linger:
        given.append("--no-linger")
    if given:
        raise typer.BadParameter(f"--bootstrap-only trains nothing: leave out {', '.join(given)}")


def _flags(
    listen: list[str] | None,
    allow: list[str] | None,
    lan: bool | None,
    dht: bool | None,
    metrics_listen: str | None,
    learning: Mapping[str, object],
) -> Mapping[str, object]:
    """What stands above config.toml."""
    return {
        "listen": listen or None,
        "allow": allow or None,
        "lan": lan,
        "dht": dht,
        "metrics_listen": metrics_listen,
        **learning,
    }


def _config(common: Common, home: Home, flags: Mapping[str, object]) -> NodeConfig:
    from node.config import load_config

    level = "debug" if common.debug else "warning" if common.quiet else None
    return load_config(home.config_file, os.environ, {**flags, "log_level": level}).config


def _parse_run(text: str | None) -> tuple[RunSpec | None, bytes | None]:
    """A run id in hexadecimal, or a run spec's file, or neither."""
    from training.run_spec import load_run_spec

    if text is None:
        return None, None
    if re.fullmatch(RUN_ID, text):
        return None, bytes.fromhex(text)
    return load_run_spec(Path(text)), None


def _based_on(spec: RunSpec, config: NodeConfig) -> RunSpec:
    """``spec``, starting from what lies at ``base_path`` unless it says itself what it starts from."""
    import trio

    from node.base import spec_based_on, weights_ref

    assert config.base_path is not None
    return spec if weights_ref(spec) is not None else trio.run(spec_based_on, spec, config.base_path)


def _live(
    common: Common,
    home: Home,
    config: NodeConfig,
    *,
    spec: RunSpec | None,
    run: bytes | None,
    bootstrap: Sequence[str],
    linger: bool,
    bootstrap_only: bool,
) -> None:
    from node.logs import set_up_logging

    sink = set_up_logging(config, color=not common.no_color)
    signal.signal(signal.SIGHUP, lambda *_: sink.reopen())
    if bootstrap_only:
        from node.rendezvous_daemon import run_rendezvous

        handed_over = run_rendezvous(home, config, spec=spec, run=run, bootstrap=bootstrap)
    else:
        from node.daemon import run_node

        handed_over = run_node(home, config, spec=spec, run=run, bootstrap=bootstrap, linger=linger)
    if handed_over:
        raise typer.Exit(ExitCode.HANDED_OVER)


def _die_with(parent: int) -> None:
    """End this process at once when process ``parent`` is no longer its parent: testnets leave no orphans."""

    def watch() -> None:
        pause = threading.Event()
        while os.getppid() == parent:
            pause.wait(PARENT_CHECK_S)
        os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=watch, name="parent watch", daemon=True).start()
