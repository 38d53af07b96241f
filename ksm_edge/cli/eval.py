"""`ksm-edge eval`: a pack's accuracy on labelled images."""

from __future__ import annotations

import argparse
import json
import sys
from typing import Any

from ksm_edge.cli.arguments import add_bundle, add_json, add_require_signature, add_threads

HELP = "measure a task pack's accuracy on a folder or zip of labelled images"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("pack", metavar="PACK", help="task pack (.ksm)")
    parser.add_argument(
        "data",
        nargs="?",
        metavar="DATA",
        help="folder or zip: its test/ if there is one, else all of its images (default: the handwritten digits)",
    )
    parser.add_argument(
        "--foreign", metavar="DATA", help="images of another task: report how many of them are called unknown"
    )
    add_bundle(parser)
    add_threads(parser)
    add_require_signature(parser)
    add_json(parser)


def run(args: argparse.Namespace) -> int:
    from ksm_edge.app.app import App
    from ksm_edge.app.evaluation import evaluate, unknown_share
    from ksm_edge.data.digits import digits
    from ksm_edge.data.image_set import open_image_set

    with App(args.bundle, args.threads, require_signature=args.require_signature) as app:
        task = app.load(args.pack)
        images = digits() if args.data is None else open_image_set(args.data, least_classes=1)
        report = {"pack": args.pack, "task": task} | evaluate(app, images, _progress)
        if args.foreign is not None:
            report["foreign_unknown"] = unknown_share(app, open_image_set(args.foreign, least_classes=1))
    if report["learned_from"]:
        print("These are the images the task was learned from: keep some apart, in test/.", file=sys.stderr)
    if args.json:
        print(json.dumps(report))
    else:
        print(_as_text(report, args.data or images.name))
    return 0


def _progress(done: int, total: int) -> None:
    """On a terminal only: in a log file every update would be a line more."""
    if sys.stderr.isatty():
        print(f"\r{done} of {total} images", end="" if done < total else "\n", file=sys.stderr, flush=True)


def _as_text(report: dict[str, Any], data: str) -> str:
    which = "its test/" if report["split"] == "test" else "all its images, as it has no test/"
    lines = [f"task {report['task']!r} on {data} ({which}): accuracy {report['accuracy']:.2%} of {report['n']} images"]
    counts = report["n_per_class"]
    lines += [f"  {share:>8.2%} of {counts[name]:<6} {name}" for name, share in report["per_class"].items()]
    known = f"{report['known']:.1%} of the images are known"
    if not report["threshold"]:
        known = "the pack has no threshold below which an image is unknown"
    lines.append(f"probabilities off by {report['calibration_error']:.1%} (expected calibration error); {known}")
    if "foreign_unknown" in report:
        lines.append(f"{report['foreign_unknown']:.1%} of the foreign images are called unknown")
    if report["skipped"]:
        lines.append(f"{len(report['skipped'])} image(s) could not be read:")
        lines += [f"  {skip['reason']}" for skip in report["skipped"]]
    return "\n".join(lines)
