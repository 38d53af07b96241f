"""`ksm-edge eval`: a pack's accuracy on labelled images."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from ksm_edge.cli.arguments import add_bundle, add_json, add_threads

if TYPE_CHECKING:
    import numpy as np

    from ksm_edge.app.app import App
    from ksm_edge.bundle.layers import InputContract
    from ksm_edge.data.image_set import ImageSet, Item

HELP = "measure a task pack's accuracy on a folder or zip of labelled images"
BATCH = 8


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("pack", metavar="PACK", help="task pack (.ksm)")
    parser.add_argument(
        "data",
        nargs="?",
        metavar="DATA",
        help="folder or zip: its test/ if there is one, else all of its images (default: the handwritten digits)",
    )
    add_bundle(parser)
    add_threads(parser)
    add_json(parser)


def run(args: argparse.Namespace) -> int:
    from ksm_edge.app.app import App
    from ksm_edge.data.digits import digits
    from ksm_edge.data.image_set import open_image_set

    with App(args.bundle, args.threads) as app:
        task = app.load(args.pack)
        images = digits() if args.data is None else open_image_set(args.data, least_classes=1)
        report = {"pack": args.pack, "task": task} | evaluate(app, images)
    if args.json:
        print(json.dumps(report))
    else:
        print(_as_text(report, args.data or images.name))
    return 0


def evaluate(app: App, images: ImageSet) -> dict[str, Any]:
    """Accuracy of the app's current task, as fractions, on test/ or else on all images; classes are matched by name."""
    from ksm_edge.errors import DataError

    split, items = ("test", images.test) if images.test else ("all", images.train)
    answers: dict[str, list[bool]] = {}
    skipped: list[dict[str, str]] = []
    done = 0
    for inputs, labels in _batches(images, items, app.bundle.input, skipped):
        logits, classes = app.logits(inputs)
        _require_classes(images, classes)
        for label, guess in zip(labels, logits.argmax(axis=1), strict=True):
            answers.setdefault(label, []).append(classes[guess] == label)
        done += len(labels)
        _show(f"\r{done} of {len(items)} images")
    _show("\n")
    if not answers:
        raise DataError(f"{images.name}: none of {len(items)} images can be read; {skipped[0]['reason']}")
    return {
        "split": split,
        "n": done,
        "accuracy": sum(map(sum, answers.values())) / done,
        "per_class": {name: sum(given) / len(given) for name, given in sorted(answers.items())},
        "n_per_class": {name: len(given) for name, given in sorted(answers.items())},
        "skipped": skipped,
    }


def _batches(
    images: ImageSet, items: Sequence[Item], contract: InputContract, skipped: list[dict[str, str]]
) -> Iterator[tuple[np.ndarray, list[str]]]:
    """Inputs (n, 3, S, S) and class names of the images that can be read; the others are added to `skipped`."""
    import numpy as np

    from ksm_edge.app.images import as_input
    from ksm_edge.errors import DataError

    inputs: list[np.ndarray] = []
    labels: list[str] = []
    for item in items:
        try:
            inputs.append(as_input(images.read(item), contract))
            labels.append(images.classes[item.label])
        except DataError as error:
            skipped.append({"image": item.source, "reason": str(error)})
        if len(inputs) == BATCH:
            yield np.stack(inputs), labels
            inputs, labels = [], []
    if inputs:
        yield np.stack(inputs), labels


def _show(progress: str) -> None:
    """On a terminal only: in a log file every update would be a line more."""
    if sys.stderr.isatty():
        print(progress, end="", file=sys.stderr, flush=True)


def _require_classes(images: ImageSet, classes: Sequence[str]) -> None:
    from ksm_edge.errors import DataError

    if strangers := sorted(set(images.classes) - set(classes)):
        raise DataError(
            f"{images.name} has classes that the pack does not know: {', '.join(strangers[:5])}; "
            f"the pack's are {', '.join(classes[:5])}{', ...' if len(classes) > 5 else ''}"
        )


def _as_text(report: dict[str, Any], data: str) -> str:
    which = "its test/" if report["split"] == "test" else "all its images, as it has no test/"
    lines = [f"task {report['task']!r} on {data} ({which}): accuracy {report['accuracy']:.2%} of {report['n']} images"]
    counts = report["n_per_class"]
    lines += [f"  {share:>8.2%} of {counts[name]:<6} {name}" for name, share in report["per_class"].items()]
    if report["skipped"]:
        lines.append(f"{len(report['skipped'])} image(s) could not be read:")
        lines += [f"  {skip['reason']}" for skip in report["skipped"]]
    return "\n".join(lines)
