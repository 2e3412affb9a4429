"""The command line: `moe-comm demo | bench | doctor`.

Each command lives in its own module, is imported when it is called, and parses its own options:
what follows the command's name is handed on as it is, `--help` included.
"""

import importlib
import sys

import click

_HANDED_ON = {"ignore_unknown_options": True, "allow_extra_args": True}


def _hand_on(command: str, args: tuple[str, ...]) -> None:
    """Runs `main` of moe_comm.`command`: a click command or a function of the argument list."""
    run = importlib.import_module(f"moe_comm.{command}").main
    if isinstance(run, click.Command):
        run.main(args=list(args), prog_name=f"moe-comm {command}")
    else:
        sys.exit(run(list(args)))


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="moe_comm")
def main() -> None:
    """Expert-parallel dispatch and combine on any network."""


@main.command(context_settings=_HANDED_ON, add_help_option=False)
@click.argument("args", nargs=-1, type=click.UNPROCESSED)
def demo(args: tuple[str, ...]) -> None:
    """Train a small MoE model over 4 processes; compare it with one."""
    _hand_on("demo", args)


@main.command(context_settings=_HANDED_ON, add_help_option=False)
@click.argument("args", nargs=-1, type=click.UNPROCESSED)
def bench(args: tuple[str, ...]) -> None:
    """Measure dispatch and combine against other ways to do it."""
    _hand_on("bench", args)


@main.command(context_settings=_HANDED_ON, add_help_option=False)
@click.argument("args", nargs=-1, type=click.UNPROCESSED)
def doctor(args: tuple[str, ...]) -> None:
    """Show the host, its devices and transports, and how to get those that are missing."""
    _hand_on("doctor", args)


if __name__ == "__main__":
    main()
