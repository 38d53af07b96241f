"""`ksm-edge verify`: whether packs are whole, whose they are, and whether they compute what they did when learned."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ksm_edge.cli.arguments import add_json

if TYPE_CHECKING:
    from ksm_edge.app.verification import Verdict

HELP = "check task packs: the files themselves, their signatures, and what they compute"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("packs", metavar="PACK|FOLDER", nargs="+", help="task packs (.ksm), or folders of them")
    parser.add_argument(
        "--bundle",
        metavar="BUNDLE",
        help='also check backbone, fused weights and golden outputs, on this bundle ("embedded" is one)',
    )
    parser.add_argument(
        "--public",
        action="append",
        metavar="PUBLIC.pem",
        help="also check that this Ed25519 key signed each pack; of several, given one by one, any may fit",
    )
    add_json(parser)


def run(args: argparse.Namespace) -> int:
    from ksm_edge.app.verification import verify_pack
    from ksm_edge.bundle.load import load_bundle
    from ksm_edge.errors import FileError
    from ksm_edge.pack.keys import load_public_key

    paths = _pack_files(args.packs)
    keys = None if args.public is None else [load_public_key(path) for path in args.public]
    bundle = None if args.bundle is None else load_bundle(args.bundle)
    verdicts = []
    for path in paths:
        verdicts.append(verify_pack(path, keys, bundle))
        if not args.json:
            print(_line(verdicts[-1], args), flush=True)
    good = all(verdict.ok for verdict in verdicts)
    if args.json:
        print(json.dumps({"ok": good, "packs": [_as_json(verdict) for verdict in verdicts]}))
    return 0 if good else FileError.exit_code


def _pack_files(given: list[str]) -> list[Path]:
    """The packs named, folders as the packs in them."""
    from ksm_edge.errors import UsageError
    from ksm_edge.pack.files import SUFFIX

    files: list[Path] = []
    for path in map(Path, given):
        found = sorted(path.glob(f"*{SUFFIX}")) if path.is_dir() else [path]
        if not found:
            raise UsageError(f"{path}: no task pack (*{SUFFIX}) in this folder")
        files += found
    return files


def _line(verdict: Verdict, args: argparse.Namespace) -> str:
    notes = []
    if verdict.signed and args.public is None:
        notes.append("its signature was not, without --public")
    if args.bundle is None:
        notes.append("only the file itself, without --bundle")
    note = f" ({'; '.join(notes)})" if notes else ""
    outcome = "ok" if verdict.ok else "OFF: " + "; ".join(verdict.faults)
    return f"{verdict.path}: checked {', '.join(verdict.checked)}{note}: {outcome}"


def _as_json(verdict: Verdict) -> dict[str, Any]:
    return {
        "path": verdict.path,
        "task": verdict.task,
        "signed": verdict.signed,
        "checked": list(verdict.checked),
        "ok": verdict.ok,
        "faults": list(verdict.faults),
    }
