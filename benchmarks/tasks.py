"""The tasks that accuracy is measured on: those of the data folder, and what is made of them.

flowers5        all of flowers5.zip
flowers5@10     10 training images of each class, drawn by the seed; the test set is whole
caltech100/3    the five classes of task 3, from 0, of caltech100_20tasks.json
"""

from __future__ import annotations

import json
import random
import zipfile
from collections.abc import Callable
from pathlib import Path, PurePosixPath

from measure import data_folder

FIVE = ("flowers5", "trashnet", "pacs_sketch7", "gtsrb43", "omniglot_small1")


def task_data(name: str, folder: Path | None = None, seed: int = 0) -> Path:
    """The task's zip or folder; one that has to be made is written into `folder`."""
    stem, at, few = name.partition("@")
    stem, slash, part = stem.partition("/")
    path = next((p for p in (data_folder() / f"{stem}.zip", data_folder() / stem) if p.exists()), None)
    if path is None:
        raise SystemExit(f"no {stem}.zip or {stem}/ in {data_folder()}; set KSM_EDGE_DATA to a folder that has it")
    if folder is None or not (at or slash):
        return path
    if slash:
        classes = set(suite(stem)[int(part)])
        path = _subset(path, folder / f"{stem}-{int(part):02}.zip", lambda member: member.parts[-2] in classes)
    if at:
        kept = _drawn(path, int(few), seed)
        path = _subset(
            path, folder / f"{path.stem}@{few}.zip", lambda member: "train" not in member.parts or member in kept
        )
    return path


def suite(name: str) -> list[list[str]]:
    """The classes of each task of the suite that `name` is split into."""
    path = data_folder() / f"{name}_20tasks.json"
    if not path.exists():
        raise SystemExit(f"no {path}; set KSM_EDGE_DATA to a folder that has it")
    return list(json.loads(path.read_text())["tasks"])


def _members(path: Path) -> list[PurePosixPath]:
    with zipfile.ZipFile(path) as file:
        return [PurePosixPath(name) for name in sorted(file.namelist()) if not name.endswith("/")]


def _drawn(path: Path, count: int, seed: int) -> set[PurePosixPath]:
    """`count` training images of each class, or all where there are fewer."""
    by_class: dict[str, list[PurePosixPath]] = {}
    for member in _members(path):
        if "train" in member.parts:
            by_class.setdefault(member.parts[-2], []).append(member)
    draw = random.Random(seed)
    return {member for of_class in by_class.values() for member in draw.sample(of_class, min(count, len(of_class)))}


def _subset(source: Path, target: Path, wanted: Callable[[PurePosixPath], bool]) -> Path:
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w") as new:
        for member in _members(source):
            if wanted(member):
                new.writestr(str(member), old.read(str(member)))
    return target
