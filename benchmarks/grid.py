"""Runs that take minutes each, kept one by one: a grid of them that was interrupted goes on where it stopped."""

from __future__ import annotations

import fcntl
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from measure import FORMAT_VERSION, read, write

# Settings that did something else than their default now does, before there was a choice or, of rivals, a record of it:
# without a share of their own (`thin`) masks were thinned by half, whatever bits they took.
BEFORE = {"head_start": "random", "scaled_rates": False, "thin_at": 2 / 3, "mask_bits": None, "crop_scale": 0.35,
          "crop_start": 0.8, "head_rate": 2e-3, "join_at": 1.0}  # fmt: skip
# What `ksm_edge.training.suited` makes of amplifying: with a score for each kernel these tasks have room for it on any
# backbone, and these backbones with any task; filters and groups have it always, single weights with these tasks alone.
MANY_CLASSES, LARGE_KERNELS = ("gtsrb43", "omniglot_small1"), ("resnet20_cifar10",)
Run = dict[str, Any]  # its `identity` is what makes two runs the same


def runs(path: Path) -> list[Run]:
    """All that are in the file; none where there is no file."""
    return [_filled(run) for run in read(path)["runs"]] if path.exists() else []


def _filled(run: Run) -> Run:
    """The run with all settings of today, those that are newer than the run at the value that they had before."""
    from ksm_edge.training.settings import Settings

    identity = run["identity"]
    if "settings" not in identity:
        return run
    defaults = {name: value for name, value in asdict(Settings()).items() if name != "seed"} | BEFORE
    filled = {**defaults, **identity["settings"]}
    if "amplify" not in identity["settings"] and _amplifies(identity, filled):
        filled["amplify"] = False
    return {**run, "identity": {**identity, "settings": filled}}


def _amplifies(identity: Mapping[str, Any], settings: Mapping[str, Any]) -> bool:
    """Whether a run like this one amplifies kernels today."""
    if settings["method"] != "ksm" or not settings["soft"] or settings["thin"] is not None:
        return False
    large = identity.get("recipe") in LARGE_KERNELS and settings["granularity"] == "kernel"
    shared = settings["granularity"] not in ("kernel", "element")
    return shared or large or identity["task"].partition("@")[0] in MANY_CLASSES


def latest(
    alike: Callable[[Run], Any], same: Callable[[Run], Any], task: Callable[[Run], Any] | None = None
) -> Callable[[list[Run]], list[Run]]:
    """A filter for runs: of those that are `alike` only the ones that are the `same` as the last of them.

    `task`: of each of these moreover only those that amplify as the last one does. Whether they do follows from the
    task, so runs of several tasks that differ in it were learned one way, and runs of one task were not.
    """

    def standing(given: list[Run]) -> list[Run]:
        last = {alike(run): same(run) for run in given}
        found = [run for run in given if same(run) == last[alike(run)]]
        return found if task is None else latest(task, _amplify)(found)

    return standing


def _amplify(run: Run) -> bool | None:
    return run["identity"].get("settings", {}).get("amplify")


def has(path: Path, identity: dict[str, Any]) -> bool:
    """Whether that run is there."""
    return any(run["identity"] == _filled({"identity": identity})["identity"] for run in runs(path))


def keep(
    path: Path,
    head: dict[str, Any],
    run: Run,
    summary: Callable[[list[Run]], dict[str, Any]],
    standing: Callable[[list[Run]], list[Run]] = list,
) -> None:
    """Add a run to the file, in the place of the same one, and what those that are `standing` now say together.

    Several processes may add to one file, each its own part of the grid.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with _alone_in(path.parent):
        run = _filled(run)
        all_runs = [other for other in runs(path) if other["identity"] != run["identity"]] + [run]
        counted = standing(all_runs)
        content: dict[str, Any] = {"version": FORMAT_VERSION, **head}
        if counted:
            content |= {name: counted[-1][name] for name in ("machine", "after")}
        content["warnings"] = [warning for one in counted for warning in one["warnings"]]
        write(path, {**content, "runs": all_runs, "summary": summary(counted)})


@contextmanager
def _alone_in(folder: Path) -> Iterator[None]:
    """Hold a lock on the folder, which leaves no lock file behind."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def resumable(main: Callable[[], int]) -> int:
    """`main`'s exit status; Ctrl-C says that nothing is lost."""
    try:
        return main()
    except KeyboardInterrupt:
        print("\ninterrupted: finished runs are kept; the same command goes on with the others", file=sys.stderr)
        return 130
