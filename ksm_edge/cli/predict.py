"""`ksm-edge predict`: what a pack says of images."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from time import sleep
from typing import TYPE_CHECKING, Any

from ksm_edge.cli.arguments import add_bundle, add_json, add_require_signature, add_threads, positive

if TYPE_CHECKING:
    from PIL.Image import Image

    from ksm_edge.app.answers import AnswerFile
    from ksm_edge.app.app import App

    Answer = dict[str, Any]
    Stamp = tuple[int, int]  # of a file: bytes, and when it was last written to

HELP = "classify images, or folders of images, with a task pack"
PACK_DIGITS = 12  # of a pack's digest, that stand with its answers
BATCH = 8  # images read at once; a power cut loses the answers to these at most
LOOK_SECONDS = 0.5  # between two looks at a folder that is watched


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("pack", metavar="PACK", help="task pack (.ksm)")
    parser.add_argument("images", metavar="IMAGE|FOLDER", nargs="+", help="image files, or folders of them")
    parser.add_argument("--top", type=positive, default=3, metavar="N", help="how many classes to name (default: 3)")
    parser.add_argument(
        "--out",
        type=Path,
        metavar="FILE",
        help="add to a .csv or .jsonl of this pack's answers; images that it has one to are left out",
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
    good, bad, listed = 0, 0, []
    with App(args.bundle, args.threads, require_signature=args.require_signature) as app, ExitStack() as until_done:
        task, answers = app.load(args.pack), None
        if args.out is not None:
            answers = until_done.enter_context(AnswerFile(args.out, f"ksm-{app.digest()[:PACK_DIGITS]}"))
        try:
            for answer in _answers(args, app, answers):
                good, bad = good + ("error" not in answer), bad + ("error" in answer)
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
    if bad and args.out is not None:
        print(f"{bad} image(s) could not be read; {args.out} says why", file=sys.stderr)
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
        yield from _coming(app, args.images, left_out, args.top)
        return
    wanted = [path for path in image_files(args.images) if str(path) not in left_out]
    batches = ([_read(app, path) for path in wanted[i : i + BATCH]] for i in range(0, len(wanted), BATCH))
    # A photo takes about as long to decode as to classify: the next ones are read while these run.
    answers = (answer for batch in prefetch(batches, depth=1) for answer in _answered(app, batch, args.top))
    yield from counted(answers, len(wanted), "Predicting") if args.out else answers


def _coming(app: App, folders: list[str], left_out: AnswerFile | Sequence[str], top: int) -> Iterator[Answer]:
    """To the images in the folders and, for ever, to those that come.

    One is read when two looks have found it the same: before that, half of it may be missing. One that cannot be read
    is read again when it has changed. No clock is asked: a board may have none, and files bring times of their own.
    """
    from ksm_edge.errors import DataError

    others = [folder for folder in map(Path, folders) if not folder.is_dir()]
    if others:
        raise DataError(f"{others[0]} is no folder: --watch takes folders")
    print(f"watching {', '.join(folders)}; Ctrl-C ends it", file=sys.stderr)
    before: dict[Path, Stamp] = {}
    answered: set[Path] = set()
    unreadable: dict[Path, Stamp] = {}
    while True:
        now = _there(folders, before)
        answered &= now.keys()  # a name may come again
        for path, stamp in now.items():
            is_still = before.get(path) == stamp != unreadable.get(path)
            if not is_still or path in answered or str(path) in left_out:
                continue
            (answer,) = _answered(app, [_read(app, path)], top)
            if "error" not in answer:
                answered.add(path)
            elif path.exists():
                unreadable[path] = stamp
            else:  # taken away before its turn
                continue
            yield answer
        before = now
        sleep(LOOK_SECONDS)


def _there(folders: list[str], before: Mapping[Path, Stamp]) -> dict[Path, Stamp]:
    """Images in the folders as they are now; as they were `before` in a folder that cannot be listed for once."""
    from ksm_edge.data.image_source import FolderSource, is_image_name
    from ksm_edge.errors import DataError

    found: dict[Path, Stamp] = {}
    for folder in map(Path, folders):
        try:
            names = FolderSource(folder).paths
        except DataError:
            found |= {path: stamp for path, stamp in before.items() if folder in path.parents}
            continue
        for path in (folder / name for name in names if is_image_name(name)):
            with suppress(OSError):  # gone again
                status = path.stat()
                found[path] = status.st_size, status.st_mtime_ns
    return found


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
