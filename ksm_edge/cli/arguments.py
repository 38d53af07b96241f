"""Options that several verbs share, so that they read and mean the same everywhere."""

from __future__ import annotations

import argparse
import re

from ksm_edge.cores import MAX_THREADS

Options = argparse._ActionsContainer  # a parser, or a group of its options
_UNITS = {"": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "kib": 2**10, "mib": 2**20, "gib": 2**30}


def add_bundle(options: Options) -> None:
    options.add_argument(
        "--bundle",
        default="embedded",
        metavar="BUNDLE",
        help="folder of an exported backbone (default: the embedded one)",
    )


def add_json(options: Options) -> None:
    options.add_argument("--json", action="store_true", help="print one JSON object on stdout instead of text")


def add_device(options: Options) -> None:
    options.add_argument(
        "--device",
        default="host",
        metavar="NAME|PATH",
        help="board profile to take threads, batch and memory budget from; see `ksm-edge devices` (default: host)",
    )


def add_threads(options: Options) -> None:
    options.add_argument(
        "--threads", type=thread_count, default=None, metavar="N", help="threads (default: the device's)"
    )


def add_require_signature(options: Options) -> None:
    options.add_argument(
        "--require-signature", metavar="PUBLIC.pem", help="refuse a pack that this Ed25519 key did not sign"
    )


def positive(text: str) -> int:
    """A whole number of at least 1."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text}: must be at least 1")
    return value


def thread_count(text: str) -> int:
    """A whole number of threads from 1 on, of which there may be so many."""
    value = positive(text)
    if value > MAX_THREADS:
        raise argparse.ArgumentTypeError(f"{text}: must be at most {MAX_THREADS}")
    return value


def natural(text: str) -> int:
    """A whole number from 0 on."""
    value = int(text)
    if value < 0:
        raise argparse.ArgumentTypeError(f"{text}: must not be below 0")
    return value


def byte_size(text: str) -> int:
    """A number of bytes with an optional unit.

    >>> byte_size("256MiB")
    268435456
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", text)
    if match is None or match[2].lower() not in _UNITS:
        raise argparse.ArgumentTypeError(f"{text!r} is no size; write it like 256MiB or 1GB")
    return int(float(match[1]) * _UNITS[match[2].lower()])
