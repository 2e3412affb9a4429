"""Runs a program that says `import deep_ep` on moe_comm, unchanged:

    python -m moe_comm.as_deep_ep script.py args…
    python -m moe_comm.as_deep_ep -m module args…
    torchrun --nproc-per-node 2 -m moe_comm.as_deep_ep script.py args…

The program is `__main__`, with its own sys.argv and sys.path, as python itself would run it. `--override` before it
hides a `deep_ep` that is installed. See alias.py.
"""

import os
import runpy
import sys

from .alias import install_as_deep_ep

USAGE = "usage: python -m moe_comm.as_deep_ep [--override] (script.py | -m module) args…"


def main(args: list[str]) -> int:
    """Runs the program; its SystemExit passes through. 2: wrong arguments, after a line on stderr."""
    override = args[:1] == ["--override"]
    args = args[1:] if override else args
    is_module = args[:1] == ["-m"]
    program = args[1:] if is_module else args
    if not program or program[0].startswith("-"):
        print(USAGE, file=sys.stderr)
        return 2
    try:
        install_as_deep_ep(override=override)
    except ImportError as error:
        print(f"moe_comm.as_deep_ep: {error}", file=sys.stderr)
        return 1
    sys.argv = list(program)
    if is_module:  # sys.path[0] is the current directory, as for `python -m module`
        runpy.run_module(program[0], run_name="__main__", alter_sys=True)
    else:
        if not sys.flags.safe_path:
            sys.path[0] = os.path.dirname(os.path.realpath(program[0]))
        runpy.run_path(program[0], run_name="__main__")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
