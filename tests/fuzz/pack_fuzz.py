"""Fuzz the pack reader: whatever the bytes, it gives a Pack or says with a FileError why not, soon and in few bytes.

    scripts/fuzz [--seconds N | --mutations N] [--seed S] [--atheris] [FILE ...]

Packs are made as `pack_mutations` does from those in tests/pack/golden/. With --atheris, libFuzzer follows what makes
the reader take new paths (pip install atheris, which has wheels for Linux) and keeps it in fuzz-findings/corpus/ for
the next time. FILEs are read as they are instead. What is found is written to fuzz-findings/ of the current folder, and
the exit code is 1.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import sys
import time
import traceback
import tracemalloc
import warnings
from collections import Counter
from pathlib import Path
from random import Random
from typing import Any

from pack_mutations import mutated

from ksm_edge.errors import FileError
from ksm_edge.pack.container import read_container
from ksm_edge.pack.metadata import read_metadata
from ksm_edge.pack.reader import decode

GOLDEN = Path(__file__).parents[1] / "pack/golden"
FINDINGS = Path("fuzz-findings")
# What one input may take: of any file, for each of its bytes, and for each value that its metadata declares within the
# format's bound and a reader therefore makes room for.
SECONDS, SECONDS_PER_VALUE = 1.0, 2e-7
BYTES, BYTES_PER_BYTE, BYTES_PER_VALUE = 64 << 20, 4, 32
ROUND = 50_000  # inputs
TRACED = 8  # one input in so many is read with its memory traced, which takes time of its own


class Tally:
    """What came of the inputs so far."""

    def __init__(self) -> None:
        self.inputs = 0
        self.packs = 0
        self.refused: Counter[str] = Counter()  # by the first words of the message
        self.findings: dict[str, bytes] = {}  # by what was wrong
        self.slowest = 0.0  # seconds
        self.most_bytes = 0

    def read(self, data: bytes) -> None:
        """Decode one input and enter what came of it."""
        self.inputs += 1
        traced = self.inputs % TRACED == 0
        if traced:
            tracemalloc.start()
        start = time.process_time()
        self._decode(data)
        seconds, used = time.process_time() - start, tracemalloc.get_traced_memory()[1]
        if traced:
            tracemalloc.stop()
            self.most_bytes = max(self.most_bytes, used)
        else:
            self.slowest = max(self.slowest, seconds)
        if not traced and seconds > SECONDS and seconds > SECONDS + SECONDS_PER_VALUE * declared(data):
            self.find(f"takes {seconds:.1f} s", data)
        room = BYTES + BYTES_PER_BYTE * len(data)
        if used > room and used > room + BYTES_PER_VALUE * declared(data):
            self.find(f"takes {used >> 20} MiB", data)

    def find(self, what: str, data: bytes) -> None:
        self.findings.setdefault(what, data)

    def _decode(self, data: bytes) -> None:
        try:
            decode(data)
            self.packs += 1
        except FileError as error:
            self.refused[" ".join(str(error).split()[:5])] += 1
            if not str(error):
                self.find("an error without a message", data)
        except KeyboardInterrupt:
            raise
        except BaseException as error:  # noqa: BLE001  # whatever else comes out is what is looked for
            where = traceback.extract_tb(error.__traceback__)[-1]
            self.find(f"{type(error).__name__} in {where.name}", data)


def declared(data: bytes) -> int:
    """Values that a pack's metadata declares, 0 where it is refused."""
    try:
        return read_metadata(read_container(data)[0]).values
    except FileError:
        return 0


def fuzz(seed: int, seconds: float, mutations: int | None) -> Tally:
    """Mutate golden packs until so many inputs are read, or so many seconds over."""
    random, tally = Random(seed), Tally()
    seeds = golden()
    end = time.monotonic() + seconds
    while tally.inputs < mutations if mutations is not None else time.monotonic() < end:
        tally.read(mutated(random, random.choice(seeds), seeds))
    return tally


def golden() -> list[bytes]:
    return [path.read_bytes() for path in sorted(GOLDEN.glob("*.ksm"))]


def fuzz_with_atheris(seed: int, seconds: float, mutations: int | None) -> int:
    """The same mutations, led by coverage, until so many inputs are read or so many seconds over; the exit code.

    libFuzzer's own memory grows by what a mutator of ours makes, some 45 kB an input, so it runs in rounds, each in a
    process of its own that goes on from the others' corpus.
    """
    try:
        import atheris
    except ImportError:
        sys.exit("--atheris needs the package atheris: pip install atheris. Without it: scripts/fuzz")
    atheris.instrument_all()
    end, left, status = time.monotonic() + seconds, mutations, 0
    while status == 0 and (left > 0 if left is not None else time.monotonic() < end):
        limits = [f"-runs={ROUND if left is None else min(left, ROUND)}"]
        limits += [f"-max_total_time={max(1, int(end - time.monotonic()))}"] if left is None else []
        if (child := os.fork()) == 0:
            _one_round(atheris, [f"-seed={seed + 1}", *limits])
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        seed, left = seed + 1, None if left is None else left - ROUND
    return status


def _one_round(atheris: Any, options: list[str]) -> None:
    """Does not come back: libFuzzer ends the process, at the first finding with its own report."""
    seeds, tally = golden(), Tally()

    def one(data: bytes) -> None:
        tally.read(data)
        if tally.findings:
            report(tally)
            raise RuntimeError(f"found: {', '.join(tally.findings)}")

    def mutator(data: bytes, max_size: int, number: int) -> bytes:
        return mutated(Random(number), data or seeds[number % len(seeds)], seeds)[:max_size]

    corpus = FINDINGS / "corpus"  # the first folder is where libFuzzer puts what takes a new path
    corpus.mkdir(parents=True, exist_ok=True)
    room = ["-max_len=2000000", "-rss_limit_mb=4096", f"-artifact_prefix={FINDINGS}/"]
    atheris.Setup([sys.argv[0], *options, *room, str(corpus), str(GOLDEN)], one, custom_mutator=mutator)
    atheris.Fuzz()


def report(tally: Tally) -> int:
    """Print what came of it and write the findings down; the exit code."""
    FINDINGS.mkdir(exist_ok=True)
    for what, data in tally.findings.items():
        path = FINDINGS / f"{hashlib.sha256(data).hexdigest()[:16]}.bin"
        path.write_bytes(data)
        print(f"{what}: {path}")
    print(
        f"{tally.inputs} inputs: {tally.packs} packs, {tally.refused.total()} refused in {len(tally.refused)} ways, "
        f"{len(tally.findings)} findings; slowest {tally.slowest:.2f} s, most memory {tally.most_bytes >> 20} MiB"
    )
    return 1 if tally.findings else 0


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=str(__doc__).split("\n")[0])
    parser.add_argument("files", metavar="FILE", nargs="*", type=Path, help="read these as they are")
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--mutations", type=int)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--atheris", action="store_true", help="let libFuzzer lead")
    args = parser.parse_args(arguments)
    warnings.simplefilter("error")
    if args.atheris:
        return fuzz_with_atheris(args.seed, args.seconds, args.mutations)
    tally = Tally() if args.files else fuzz(args.seed, args.seconds, args.mutations)
    for path in args.files:
        tally.read(path.read_bytes())
    return report(tally)


if __name__ == "__main__":
    sys.exit(main())
