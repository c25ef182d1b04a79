"""The ``ebm-guard`` command: one file per command, loaded when it is called.

Nothing here imports torch, so that ``--help`` is instant.
"""

from __future__ import annotations

import os
import sys
from importlib import import_module
from importlib.metadata import version
from typing import Any

import click

from ebm_guard.errors import EbmGuardError

COMMANDS = (
    "demo",
    "report",
    "attack",
    "fit",
    "predict",
    "export",
    "serve",
    "recalibrate",
    "shadow",
    "finetune",
    "sample",
    "list",
    "info",
)
# Those that several processes can share under torchrun, and those that only print.
SHARED = ("report", "fit", "predict", "finetune", "list", "info")
_INTERRUPTED = 130


class LazyGroup(click.Group):
    """A group that imports a command's module when the command is asked for."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Return the commands in their documented order."""
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Import one command."""
        if cmd_name not in COMMANDS:
            return None
        module = import_module(f"ebm_guard.cli.{cmd_name}_command")
        command: click.Command = module.command
        # Docstrings with a backslash are raw; click's mark of lines to keep is the character.
        command.help = (command.help or "").replace("\\b\n", "\b\n")
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """Suggest near names for an unknown command."""
        from ebm_guard.errors import suggest

        if args and args[0] not in COMMANDS and not args[0].startswith("-"):
            ctx.fail(f"no command {args[0]!r}{suggest(args[0], COMMANDS)}")
        several = "RANK" in os.environ and os.environ.get("WORLD_SIZE", "1") != "1"
        if args and args[0] not in SHARED and several:
            ctx.fail(
                f"{args[0]} runs in one process, and WORLD_SIZE says that this is one of several "
                f"(torchrun); start it without torchrun. Several can share: {', '.join(SHARED[:4])}"
            )
        return super().resolve_command(ctx, args)


@click.group(
    cls=LazyGroup,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    epilog=(
        "Exit codes: 0 done, requirements met; 1 a requirement failed; 2 wrong usage; 3 bad data "
        "or artefact; 4 a live model misbehaved. Results go to stdout, progress to stderr."
    ),
)
@click.version_option(version("ebm-guard"), prog_name="ebm-guard")
def cli() -> None:
    """Make a trained classifier trustworthy: report, gate, decide."""


def main(args: list[str] | None = None) -> None:
    """Run the command line and exit with its documented code."""
    sys.exit(run(args))


def run(args: list[str] | None = None) -> int:
    """Run the command line and return its exit code; errors go to stderr."""
    try:
        result: Any = cli.main(args=args, prog_name="ebm-guard", standalone_mode=False)
    except click.ClickException as error:
        error.show()
        return 2
    except (click.Abort, KeyboardInterrupt):
        click.echo("interrupted; nothing half-written was left", err=True)
        return _INTERRUPTED
    except EbmGuardError as error:
        click.echo(f"error: {error}", err=True)
        return error.exit_code
    return result if isinstance(result, int) else 0
