"""`ksm-edge predict`: what a pack says of images."""

from __future__ import annotations

import argparse
import json
from typing import Any

from ksm_edge.cli.arguments import add_bundle, add_json, add_require_signature, add_threads

HELP = "classify images, or folders of images, with a task pack"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("pack", metavar="PACK", help="task pack (.ksm)")
    parser.add_argument("images", metavar="IMAGE|FOLDER", nargs="+", help="image files, or folders of them")
    parser.add_argument("--top", type=int, default=3, metavar="N", help="how many classes to name (default: 3)")
    add_bundle(parser)
    add_threads(parser)
    add_require_signature(parser)
    add_json(parser)


def run(args: argparse.Namespace) -> int:
    from ksm_edge.app.app import App
    from ksm_edge.data.image_set import image_files
    from ksm_edge.errors import DataError

    good = 0
    listed: list[dict[str, Any]] = []
    with App(args.bundle, args.threads, require_signature=args.require_signature) as app:
        task = app.load(args.pack)
        for path in image_files(args.images):
            try:
                (prediction,) = app.predict(path, top=args.top)
                top = [{"label": label, "probability": share} for label, share in prediction.top]
                listed.append({"image": str(path), "top": top})
                good += 1
            except DataError as error:
                listed.append({"image": str(path), "error": str(error)})
            if not args.json:
                print(_line(listed[-1]), flush=True)
    if args.json:
        print(json.dumps({"task": task, "predictions": listed}))
    return 0 if good else 1


def _line(entry: dict[str, Any]) -> str:
    if "error" in entry:
        return f"not read: {entry['error']}"
    return f"{entry['image']}: " + ", ".join(f"{guess['label']} {guess['probability']:.1%}" for guess in entry["top"])
