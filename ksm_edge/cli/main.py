"""The command line: the verbs, and the one place where errors become exit codes.

0 fine · 1 failure · 2 usage · 3 wrong backbone, bad signature or damaged file · 4 unsupported operator or runtime
5 over budget · 130 interrupted, resumable
"""

from __future__ import annotations

import argparse
import io
import os
import sys
from collections.abc import Sequence
from types import ModuleType

from ksm_edge import __version__
from ksm_edge.cli import adapt, devices, eval, export, fuse, inspect, predict, profile, sign, verify
from ksm_edge.cli.limited import emulation, run_emulated
from ksm_edge.errors import KsmEdgeError
from ksm_edge.limits import end_with_supervisor, enforced_by

VERBS: dict[str, ModuleType] = {
    "export": export,
    "adapt": adapt,
    "eval": eval,
    "predict": predict,
    "inspect": inspect,
    "fuse": fuse,
    "sign": sign,
    "verify": verify,
    "profile": profile,
    "devices": devices,
}
INTERRUPTED = 130


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="ksm-edge",
        description="Teach one frozen vision backbone new tasks on the device itself, each kept as a small task pack.",
        epilog="First try: ksm-edge adapt --device jetson",
    )
    parser.add_argument("--version", action="version", version=f"ksm-edge {__version__}")
    verbs = parser.add_subparsers(dest="verb", metavar="VERB", required=True)
    for name, module in VERBS.items():
        verb = verbs.add_parser(name, help=module.HELP, description=module.HELP[0].upper() + module.HELP[1:] + ".")
        module.add_arguments(verb)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb and return the exit code."""
    if isinstance(sys.stdout, io.TextIOWrapper) and sys.stdout.errors == "strict":
        sys.stdout.reconfigure(errors="backslashreplace")  # a file's name may be no text, or none of this terminal's
    given = sys.argv[1:] if argv is None else list(argv)
    args = build_parser().parse_args(given, argparse.Namespace(command_line=given))
    try:
        if (board := emulation(args)) is not None:
            return run_emulated(args, board)
        if enforced_by() is not None:
            end_with_supervisor()
        return int(VERBS[args.verb].run(args))
    except KsmEdgeError as error:
        print(f"ksm-edge {args.verb}: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print(f"\nksm-edge {args.verb}: interrupted", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:  # the reader of our stdout left: not an error of ours
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except OSError as error:
        print(f"ksm-edge {args.verb}: {error.filename or 'the system'}: {error.strerror or error}", file=sys.stderr)
        return 1


def entry() -> None:
    sys.exit(main())
