"""`ksm-edge fuse`: one task as files that other runtimes open, with none of this project's code."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING

from ksm_edge.cli.arguments import add_bundle, add_json
from ksm_edge.errors import UsageError

if TYPE_CHECKING:
    from ksm_edge.bundle.layers import Bundle
    from ksm_edge.pack.record import Pack

HELP = "write a task's fused weights for ONNX Runtime or ExecuTorch alone"
SUFFIXES = {"onnx": ".onnx", "ptd": ".ptd"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("pack", type=Path, metavar="PACK")
    add_bundle(parser)
    parser.add_argument(
        "--to", choices=tuple(SUFFIXES), help="one plain ONNX file, or an ExecuTorch data file beside the bundle's .pte"
    )
    parser.add_argument("--out", type=Path, metavar="FILE", help="file to write (default: the pack's name, here)")
    add_json(parser)


def run(args: argparse.Namespace) -> int:
    from ksm_edge.bundle.load import load_bundle
    from ksm_edge.pack.files import load_pack, require_backbone

    kind = args.to or next((kind for kind, suffix in SUFFIXES.items() if args.out and args.out.suffix == suffix), None)
    if kind is None:
        raise UsageError(f"say what to write: --to {' or --to '.join(SUFFIXES)}")
    out = args.out or Path(f"{args.pack.stem}{SUFFIXES[kind]}")
    bundle, pack = load_bundle(args.bundle), load_pack(args.pack)
    require_backbone(pack, bundle)
    if out.suffix != SUFFIXES[kind]:
        raise UsageError(f"{out}: --to {kind} writes a {SUFFIXES[kind]} file")
    if out.parent.resolve() == bundle.path.resolve():
        raise UsageError(f"{out} is in the bundle's own folder: give another place with --out")
    written = _write(kind, bundle, pack, out)
    sizes = {str(path): path.stat().st_size for path in written}
    summary = {"task": pack.task, "classes": list(pack.classes), "to": kind, "files": sizes}
    if args.json:
        print(json.dumps(summary))
    else:
        print(f"{pack.task}, {len(pack.classes)} classes")
        for name, size in sizes.items():
            print(f"  {name}  {size:,} bytes")
        if kind == "ptd":
            print(
                f"Opens beside {bundle.path / 'backbone.pte'}; the logits are in the order of the classes in the .json"
            )
    return 0


def _write(kind: str, bundle: Bundle, pack: Pack, out: Path) -> list[Path]:
    """The files written: `out`, and for ExecuTorch what has to be known beside it."""
    from ksm_edge.app.standalone import executorch_files, onnx_model
    from ksm_edge.atomic import atomic_write

    if kind == "onnx":
        files = {out: onnx_model(bundle, pack).SerializeToString()}
    else:
        data, labels = executorch_files(bundle, pack)
        files = {out: data, out.with_suffix(".json"): labels.encode()}
    for path, content in files.items():
        with atomic_write(path) as file:
            file.write(content)
    return list(files)
