"""Commands about this home and this program, which need no running node: config, keys, version, help."""

from __future__ import annotations

import dataclasses
import os
from importlib.metadata import version as version_of
from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.table import Table

from cli.common import Common, command
from cli.exit_codes import ExitCode

config_app = typer.Typer(help="What this node is set to, and where it keeps things.", no_args_is_help=True)
keys_app = typer.Typer(help="The identity of this node.", no_args_is_help=True)


def register(app: typer.Typer) -> None:
    """Add this module's commands to ``app``."""
    app.add_typer(config_app, name="config", rich_help_panel="This machine")
    app.add_typer(keys_app, name="keys", rich_help_panel="This machine")
    command(app, "version", rich_help_panel="This machine")(version)
    command(app, "help", rich_help_panel="This machine")(help_topic)


@command(config_app, "show")
def config_show(common: Common) -> None:
    """Every setting, its value, and where the value comes from."""
    from node.config import load_config, setting_as_toml

    loaded = load_config(common.home.config_file, os.environ)
    table = _table("setting", "value", "from")
    result = {}
    for key, origin in loaded.origins.items():
        value = getattr(loaded.config, key)
        table.add_row(key, "" if value is None else setting_as_toml(key, value), origin)
        result[key] = {"value": str(value) if isinstance(value, Path) else value, "origin": origin}
    common.print(result, table)


@command(config_app, "paths")
def config_paths(common: Common) -> None:
    """Where this node keeps its key, settings, shards and logs."""
    home = common.home
    run = home.remembered_run()
    paths = {
        "config": home.config_file,
        "identity": home.identity_file,
        **({} if run is None else {"swarm key": home.swarm_key_file(run)}),
        "runs": home.runs_folder,
        "logs": home.logs_folder,
        "lock": home.lock_file,
        "control": home.control_socket,
    }
    table = _table("what", "where", "")
    for name, path in paths.items():
        table.add_row(name, str(path), "" if path.exists() else "not there yet")
    common.print({name: str(path) for name, path in paths.items()}, table)


@command(config_app, "limits")
def config_limits(common: Common) -> None:
    """Every bound on what a peer may make this node hold, send or wait for."""
    from p2p.limits import Limits

    limits = dataclasses.asdict(Limits())
    table = _table("limit", "value")
    for name, value in limits.items():
        table.add_row(name, f"{value:,}")
    common.print(limits, table)


@command(config_app, "check")
def config_check(
    common: Common,
    spec: Annotated[
        Path | None, typer.Argument(metavar="SPEC.toml", help="A run spec to check as well.")
    ] = None,
) -> None:
    """Check the settings of this node, and a run spec if one is named; says its run id."""
    from node.config import load_config

    file = common.home.config_file
    load_config(file, os.environ)
    settings = str(file) if file.exists() else f"{file} (not there: defaults)"
    result: dict[str, object] = {"config": settings}
    lines = [f"config  {settings}  ok"]
    if spec is not None:
        from training.run_spec import load_run_spec, run_id

        loaded = load_run_spec(spec)
        result |= {"spec": str(spec), "run_id": run_id(loaded).hex(), "parameters": loaded.model.parameters}
        size = loaded.model.parameters
        described = (
            f"{size:,} parameters"
            if size
            else "whose model comes with --base DIRECTORY, and with it another id"
        )
        lines.append(f"spec    {spec}  ok: {loaded.name}, {described}")
        lines.append(f"run id  {run_id(loaded).hex()}")
    common.print(result, "\n".join(lines))


@command(keys_app, "show")
def keys_show(common: Common) -> None:
    """This node's peer id, which is its public key. The private key is never shown."""
    from p2p.identity import Identity

    file = common.home.identity_file
    peer = Identity.load(file).peer
    common.print(
        {"peer": peer, "file": str(file)}, f"peer  {peer}\nkey   {file} (private: back it up, never share it)"
    )


def version(common: Common) -> None:
    """The versions of gossamer and of what it stands on."""
    names = ("gossamer", "libp2p", "torch", "trio", "cbor2", "blake3")
    versions = {name: version_of(name) for name in names}
    common.print(versions, "\n".join(f"{name:<9} {number}" for name, number in versions.items()))


def help_topic(
    common: Common,
    topic: Annotated[
        Literal["exit-codes"], typer.Argument(metavar="TOPIC", help="What to explain: exit-codes.")
    ] = "exit-codes",
) -> None:
    """Explain what is not a command: the exit codes."""
    table = _table("code", "meaning")
    for code in ExitCode:
        table.add_row(str(int(code)), code.meaning)
    common.print({str(int(code)): code.meaning for code in ExitCode}, table)


def _table(*columns: str) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in columns:
        table.add_column(column, overflow="fold")
    return table
