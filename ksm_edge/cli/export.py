"""`ksm-edge export`: freeze a backbone once, into a bundle."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ksm_edge.cli.arguments import add_json, positive
from ksm_edge.errors import UnsupportedError, UsageError

if TYPE_CHECKING:
    import numpy as np

    from ksm_edge.bundle.freeze import Frozen
    from ksm_edge.bundle.layers import Bundle, InputContract
    from ksm_edge.bundle.recipe import Recipe, WeightSource

HELP = "freeze a backbone into a bundle"
ROWS = 64  # as in ksm_edge.bundle.mobile, which would import numpy here


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("recipe", nargs="?", metavar="RECIPE", help="name of a recipe, such as mobilenet_v2, or a .toml of your own")
    add("--onnx", type=Path, metavar="FILE", help="instead of a recipe: a classifier as ONNX, with its weights")
    add("--weights", default="auto", metavar="FILE|auto", help=".safetensors, or .pth with torch (default: download)")
    add("--out", required=True, type=Path, metavar="BUNDLE", help="folder to write")
    add("--features", metavar="NODE", help="node or tensor to end at (default: what the first Linear layer takes)")
    add("--size", type=int, metavar="PX", help="side of the input (default: the recipe's; 224 for --onnx)")
    add("--resize", type=int, metavar="PX", help="short side before the centre crop (default: in proportion)")
    add("--mean", type=float, nargs=3, metavar="X", help="of R, G, B in 0..1 (default: the recipe's, or ImageNet's)")
    add("--std", type=float, nargs=3, metavar="X", help="likewise")
    add("--licence", metavar="TEXT", help="licence of the weights, kept in the bundle")
    add("--executorch", type=positive, nargs="?", const=ROWS, metavar="CLASSES",
        help=f"also an ExecuTorch program for tasks of up to CLASSES classes ({ROWS}); needs torch")  # fmt: skip
    add("--overwrite", action="store_true", help="replace a bundle that is there")
    add_json(parser)


def run(args: argparse.Namespace) -> int:
    from ksm_edge.bundle.make import save_bundle

    if (args.recipe is None) == (args.onnx is None):
        raise UsageError("give a RECIPE or --onnx FILE, and not both; recipes: " + ", ".join(_recipe_names()))
    if args.executorch is not None:
        _require_executorch()
    frozen, settings = _from_onnx(args) if args.onnx else _from_recipe(args)
    bundle = save_bundle(frozen, args.out, overwrite=args.overwrite, **settings)
    if args.executorch is not None:
        from ksm_edge.exporter.executorch import write_program

        print("ExecuTorch: lowering, half a minute ...", file=sys.stderr)
        write_program(bundle, args.executorch)
    summary = _summary(bundle, args.out)
    print(json.dumps(summary) if args.json else _as_text(summary))
    return 0


def _recipe_names() -> list[str]:
    from ksm_edge.bundle.recipe import recipe_names

    return recipe_names()


def _from_onnx(args: argparse.Namespace) -> tuple[Frozen, dict[str, Any]]:
    from ksm_edge.bundle.digest import file_sha256
    from ksm_edge.bundle.layers import InputContract
    from ksm_edge.bundle.make import UNKNOWN_LICENCE, freeze_onnx

    if args.weights != "auto":
        raise UsageError("--weights goes with a RECIPE; an ONNX file brings its own")
    imagenet = InputContract(224, 256, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    frozen = freeze_onnx(args.onnx, args.features)
    source = {"file": args.onnx.name, "sha256": file_sha256(args.onnx)}
    return frozen, {
        "recipe": f"onnx:{args.onnx.name}",
        "input_contract": _contract(args, imagenet),
        "licence": args.licence or UNKNOWN_LICENCE,
        "source": source,
    }


def _from_recipe(args: argparse.Namespace) -> tuple[Frozen, dict[str, Any]]:
    from ksm_edge.bundle.digest import file_sha256
    from ksm_edge.bundle.make import UNKNOWN_LICENCE, freeze_recipe
    from ksm_edge.bundle.recipe import load_recipe, without_prefix

    recipe = load_recipe(args.recipe)
    path = _download(recipe) if args.weights == "auto" else Path(args.weights)
    tensors = _read_weights(path)
    sha256 = file_sha256(path)
    known: WeightSource | None = recipe.source_of(sha256)
    if known is not None:
        tensors = without_prefix(tensors, known.strip_prefix)
    frozen = freeze_recipe(recipe, tensors, args.features)
    return frozen, {
        "recipe": recipe.name,
        "input_contract": _contract(args, recipe.input),
        "licence": args.licence or (known.licence if known else UNKNOWN_LICENCE),
        "source": {"file": path.name, "sha256": sha256, "from": known.source if known else None},
    }


def _contract(args: argparse.Namespace, default: InputContract) -> InputContract:
    from ksm_edge.bundle.recipe import at_size, input_contract

    sized = default if args.size is None else at_size(default, args.size)
    resize = sized.resize if args.resize is None else args.resize
    return input_contract(sized.size, resize, args.mean or sized.mean, args.std or sized.std)


def _download(recipe: Recipe) -> Path:
    from ksm_edge.bundle.download import fetch

    source = recipe.download
    if source is None or source.url is None:
        known = f" (known: {'; '.join(w.source for w in recipe.weights)})" if recipe.weights else ""
        raise UsageError(f"recipe {recipe.name} names no address to download from; give --weights FILE{known}")
    if not source.url.endswith(".safetensors"):
        _require_torch(source.url)  # before the download, not after it
    print(f"weights: {source.url}", file=sys.stderr)
    return fetch(source.url, source.digits)


def _read_weights(path: Path) -> dict[str, np.ndarray]:
    from ksm_edge.bundle.statedict import read_state_dict

    if not path.is_file():
        raise UsageError(f"{path}: no such file; --weights takes a .safetensors or .pth file, or auto")
    if path.suffix == ".safetensors":
        return read_state_dict(path)
    _require_torch(str(path))
    from ksm_edge.exporter.pth import read_pth

    return read_pth(path)


def _require_executorch() -> None:
    from ksm_edge.runtimes import executorch

    if (reason := executorch.available()) is not None:
        raise UnsupportedError(f"--executorch: {reason}")


def _require_torch(weights: str) -> None:
    """A board has no torch: what it needs is the same state dict as safetensors."""
    import importlib.util

    if importlib.util.find_spec("torch") is None:
        raise UnsupportedError(
            f"{weights} is a torch file, and torch is not here. On a machine that has it, convert the state dict with "
            "safetensors.torch.save_file and give the .safetensors with --weights, or make the bundle there "
            "(pip install 'ksm-edge[export]') and copy its folder"
        )


def _summary(bundle: Bundle, out: Path) -> dict[str, Any]:
    shapes = [layer.weight_shape for layer in bundle.layers]
    return {
        "bundle": str(out),
        "recipe": bundle.recipe,
        "licence": bundle.licence,
        "backbone": bundle.digest,
        "layers": len(shapes),
        "layers_with_batch_norm": sum(layer.has_norm for layer in bundle.layers),
        "kernels": sum(shape[0] * shape[1] for shape in shapes),
        "conv_weights": sum(shape[0] * shape[1] * shape[2] * shape[3] for shape in shapes),
        "features": bundle.features,
        "size": bundle.input.size,
        "bundle_bytes": sum(path.stat().st_size for path in bundle.path.iterdir()),
    }


def _as_text(summary: dict[str, Any]) -> str:
    folded = "" if summary["layers_with_batch_norm"] else "\nno batch-norm: the network has none, or it came in folded"
    return (
        f"{summary['bundle']}: {summary['recipe']}, {summary['layers']} conv layers, {summary['kernels']:,} kernels, "
        f"{summary['features']} features, {summary['size']} px, {summary['bundle_bytes']:,} bytes\n"
        f"backbone {summary['backbone']}\n"
        f"licence {summary['licence']}{folded}\n"
        f"next: ksm-edge adapt DATA --bundle {summary['bundle']}"
    )
