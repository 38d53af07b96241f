"""`ksm-edge sign`: vouch for task packs with a private key."""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path

from ksm_edge.cli.arguments import add_json

HELP = "sign task packs with an Ed25519 key, in place"
PASSPHRASE = "KSM_EDGE_KEY_PASSPHRASE"
MAKING_A_KEY = f"""\
make a key:
  openssl genpkey -algorithm ed25519 -out key.pem
  openssl pkey -in key.pem -pubout -out public.pem

key.pem stays with who signs; public.pem goes to the boards, for `ksm-edge verify --public`
and `--require-signature`. The passphrase of an encrypted key is asked for, or taken from
the environment variable {PASSPHRASE}.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog, parser.formatter_class = MAKING_A_KEY, argparse.RawDescriptionHelpFormatter
    parser.add_argument("packs", metavar="PACK", nargs="+", help="task pack (.ksm); a signature it has is replaced")
    parser.add_argument("--key", required=True, metavar="PRIVATE.pem", help="Ed25519 private key, encrypted or not")
    parser.add_argument("--out", type=Path, metavar="PATH", help="write the one PACK there and leave it as it is")
    add_json(parser)


def run(args: argparse.Namespace) -> int:
    from ksm_edge.atomic import atomic_write
    from ksm_edge.errors import UsageError
    from ksm_edge.pack.files import load_pack_and_bytes
    from ksm_edge.pack.keys import load_private_key
    from ksm_edge.pack.signature import signed

    if args.out is not None and len(args.packs) > 1:
        raise UsageError(
            f"--out names one file, and {len(args.packs)} packs are given: sign them one by one, or in place"
        )
    key = load_private_key(args.key, lambda: _passphrase(args.key))
    # All are read and checked before the first is written: a call that fails leaves every pack as it was.
    results = [(path, signed(load_pack_and_bytes(path)[1], key)) for path in args.packs]
    reports = []
    for path, data in results:
        out = args.out or Path(path)
        with atomic_write(out) as file:
            file.write(data)
        reports.append({"path": path, "out": str(args.out or path), "pack_bytes": len(data)})
        if not args.json:
            print(f"{reports[-1]['out']}: signed, {len(data):,} bytes")
    if args.json:
        print(json.dumps({"packs": reports}))
    return 0


def _passphrase(path: str) -> bytes:
    import getpass

    from ksm_edge.errors import KeyFileError

    given = os.environ.get(PASSPHRASE)
    if given is None and not sys.stdin.isatty():
        raise KeyFileError(f"{path}: the key is encrypted: set {PASSPHRASE}, or call from a terminal to be asked")
    return (getpass.getpass(f"Passphrase of {path}: ") if given is None else given).encode()
