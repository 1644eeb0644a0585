"""The ``gossamer`` program: assembles the commands, and turns every error into three lines and an exit code.

Starting must stay quick: torch and libp2p are imported by ``gossamer run`` alone, trio by what talks to a node.
"""

from __future__ import annotations

import itertools
import sys
import tempfile
import traceback
from collections.abc import Iterator, Sequence
from typing import Any

import msgspec
import typer
from rich.console import Console

from cli import (
    ask_commands,
    doctor,
    home_commands,
    node_commands,
    service_commands,
    sim_commands,
    swarm_commands,
    testnet,
    train_commands,
)
from cli.common import Common, remember_global_options
from cli.exit_codes import ExitCode, exit_code_of
from p2p.errors import GossamerError

app = typer.Typer(
    name="gossamer",
    help="Train neural networks over a peer-to-peer network with no central server.\n\n"
    "Try it on this machine: [bold]gossamer testnet up[/bold]",
    callback=remember_global_options,
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
node_commands.register(app)
swarm_commands.register(app)
train_commands.register(app)
ask_commands.register(app)
testnet.register(app)
sim_commands.register(app)
doctor.register(app)
service_commands.register(app)
home_commands.register(app)

_Misuse: Any = typer.BadParameter.__base__
"""What typer raises for any command line that it cannot use; it exports no name for it."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command line; returns its exit code. Never raises, and never shows a traceback unasked."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    try:
        code = app(args=arguments, prog_name="gossamer", standalone_mode=False)
    except SystemExit as end:
        code = end.code
    except KeyboardInterrupt:
        return ExitCode.INTERRUPTED
    except _Misuse as misuse:
        if text := misuse.format_message():  # else its help has been shown instead
            _print_error(_usage(text, misuse.ctx, arguments), ExitCode.USAGE, arguments)
        return ExitCode.USAGE
    except BaseException as error:
        return _explain(error, arguments)
    return code if isinstance(code, int) else ExitCode.OK


def _usage(text: str, context: typer.Context | None, arguments: Sequence[str]) -> GossamerError:
    if (
        context is None
    ):  # an option that is the last word and lacks its value: the parser does not say of which command
        named = itertools.takewhile(lambda word: not word.startswith("-"), arguments)
        fix = " ".join(["gossamer", *named, "--help"])
        return GossamerError(text, why="the line ends where its value should come", fix=fix)
    form = " ".join(context.get_usage().split()).removeprefix("Usage: ")
    return GossamerError(text, why=f"the form is: {form}", fix=f"{context.command_path} --help")


def _explain(error: BaseException, arguments: Sequence[str]) -> ExitCode:
    """Print ``error``, with the errors in groups of it, and choose the exit code."""
    causes = list(_causes(error))
    if any(isinstance(cause, KeyboardInterrupt) for cause in causes):
        return ExitCode.INTERRUPTED
    if "--debug" in arguments:
        traceback.print_exception(error)
    readable = [cause for cause in causes if isinstance(cause, GossamerError)]
    if len(readable) == len(causes):
        code, shown = exit_code_of(readable[0]), readable[0]
    else:
        code, shown = ExitCode.FAILED, _unexpected(error)
    _print_error(shown, code, arguments)
    return code


def _print_error(shown: GossamerError, code: ExitCode, arguments: Sequence[str]) -> None:
    """For a person, or as JSON for a program; on stderr."""
    if "--json" in arguments:
        about = {"code": int(code), "what": shown.what, "why": shown.why, "fix": shown.fix}
        sys.stderr.write(msgspec.json.encode({"error": about}).decode() + "\n")
        return
    console: Console = Common(no_color="--no-color" in arguments).err()
    for label, style, text in [
        ("error", "bold red", shown.what),
        ("why", "bold", shown.why),
        ("fix", "bold green", shown.fix),
    ]:
        if text:
            console.print(f"[{style}]{label:<5}[/]", end=" ")
            console.print(text, markup=False, soft_wrap=True)


def _unexpected(error: BaseException) -> GossamerError:
    with tempfile.NamedTemporaryFile("w", prefix="gossamer-error-", suffix=".txt", delete=False) as file:
        file.write("".join(traceback.format_exception(error)))
    return GossamerError(
        f"unexpected {type(error).__name__}: {error}",
        why="this is a bug in gossamer, not something you did",
        fix=f"please report it with {file.name}",
    )


def _causes(error: BaseException) -> Iterator[BaseException]:
    """The errors inside nurseries' groups, or ``error`` itself."""
    if isinstance(error, BaseExceptionGroup):
        for inner in error.exceptions:
            yield from _causes(inner)
    else:
        yield error
