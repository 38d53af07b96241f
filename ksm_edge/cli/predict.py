"""`ksm-edge predict`: what a pack says of images."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ksm_edge.cli.arguments import add_bundle, add_json, add_require_signature, add_threads

if TYPE_CHECKING:
    from PIL.Image import Image

    from ksm_edge.app.answers import AnswerFile
    from ksm_edge.app.app import App

    Answer = dict[str, Any]

HELP = "classify images, or folders of images, with a task pack"
BATCH = 8  # images read at once; a power cut loses the answers to these at most
LOOK_SECONDS = 0.5  # between two looks at a folder that is watched
SETTLED_SECONDS = 0.5  # since a new file was last written to: before that, half of it may be missing


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("pack", metavar="PACK", help="task pack (.ksm)")
    parser.add_argument("images", metavar="IMAGE|FOLDER", nargs="+", help="image files, or folders of them")
    parser.add_argument("--top", type=int, default=3, metavar="N", help="how many classes to name (default: 3)")
    parser.add_argument(
        "--out", type=Path, metavar="FILE", help="add to a .csv or .jsonl; images that are in it already are left out"
    )
    parser.add_argument("--watch", action="store_true", help="go on with every new image in the folders, until Ctrl-C")
    add_bundle(parser)
    add_threads(parser)
    add_require_signature(parser)
    add_json(parser)


def run(args: argparse.Namespace) -> int:
    from ksm_edge.app.answers import AnswerFile
    from ksm_edge.app.app import App
    from ksm_edge.errors import UsageError

    if args.json and (args.watch or args.out):
        raise UsageError("--json is one object at the end: with --watch or --out, write --out FILE.jsonl")
    good, listed = 0, []
    with (
        App(args.bundle, args.threads, require_signature=args.require_signature) as app,
        nullcontext() if args.out is None else AnswerFile(args.out) as answers,
    ):
        task = app.load(args.pack)
        try:
            for answer in _answers(args, app, answers):
                good += "error" not in answer
                if answers is not None:
                    answers.add(answer)
                elif args.json:
                    listed.append(answer)
                else:
                    print(_line(answer), flush=True)
        except KeyboardInterrupt:
            if not args.watch:
                raise
            return 0  # that is how watching ends
        done = 0 if answers is None else len(answers)
    if args.json:
        print(json.dumps({"task": task, "predictions": listed}))
    return 0 if good or done else 1


def _answers(args: argparse.Namespace, app: App, given: AnswerFile | None) -> Iterator[Answer]:
    """One for each image that `given` has none of, in order; with --out behind a progress bar."""
    from ksm_edge.cli.progress import counted
    from ksm_edge.data.image_set import image_files
    from ksm_edge.data.prefetch import prefetch

    left_out = given if given is not None else ()
    if args.watch:
        for path in _coming(args.images):
            if str(path) not in left_out:
                yield from _answered(app, [_read(app, path)], args.top)
        return
    wanted = [path for path in image_files(args.images) if str(path) not in left_out]
    batches = ([_read(app, path) for path in wanted[i : i + BATCH]] for i in range(0, len(wanted), BATCH))
    # A photo takes about as long to decode as to classify: the next ones are read while these run.
    answers = (answer for batch in prefetch(batches, depth=1) for answer in _answered(app, batch, args.top))
    yield from counted(answers, len(wanted), "Predicting") if args.out else answers


def _coming(folders: list[str]) -> Iterator[Path]:
    """The images in the folders and, for ever, those that come."""
    from ksm_edge.errors import DataError

    others = [folder for folder in map(Path, folders) if not folder.is_dir()]
    if others:
        raise DataError(f"{others[0]} is no folder: --watch takes folders")
    seen: set[Path] = set()
    print(f"watching {', '.join(folders)}; Ctrl-C ends it", file=sys.stderr)
    while True:
        for path in _there(folders):
            if path not in seen and time.time() - path.stat().st_mtime > SETTLED_SECONDS:
                seen.add(path)
                yield path
        time.sleep(LOOK_SECONDS)


def _there(folders: list[str]) -> list[Path]:
    """Images in the folders as they are now, which may be none."""
    from ksm_edge.data.image_set import image_files
    from ksm_edge.errors import DataError

    found: list[Path] = []
    for folder in folders:
        try:
            found += image_files([folder])
        except DataError:
            continue
    return [path for path in found if path.exists()]


def _read(app: App, path: Path) -> tuple[Path, Image | str]:
    """The image as it is classified, or why it cannot be."""
    from ksm_edge.app.images import opened
    from ksm_edge.errors import DataError

    try:
        return path, opened(path, app.bundle.input)
    except DataError as error:
        return path, str(error)


def _answered(app: App, batch: Sequence[tuple[Path, Image | str]], top: int) -> Iterator[Answer]:
    predictions = iter(app.predict([image for _, image in batch if not isinstance(image, str)], top=top))
    for path, image in batch:
        if isinstance(image, str):
            yield {"image": str(path), "error": image}
            continue
        prediction = next(predictions)
        top_classes = [{"label": label, "probability": share} for label, share in prediction.top]
        yield {"image": str(path), "known": prediction.known, "top": top_classes}


def _line(entry: Answer) -> str:
    if "error" in entry:
        return f"not read: {entry['error']}"
    unknown = "" if entry["known"] else "unknown; perhaps "
    return f"{entry['image']}: {unknown}" + ", ".join(
        f"{guess['label']} {guess['probability']:.1%}" for guess in entry["top"]
    )
