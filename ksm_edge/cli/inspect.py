"""`ksm-edge inspect`: what a pack holds and where its bytes go, without its backbone and without a runtime."""

from __future__ import annotations

import argparse
import json
from typing import TYPE_CHECKING, Any

from ksm_edge.cli.arguments import add_json

if TYPE_CHECKING:
    from ksm_edge.pack.record import Pack

SIGNED = "yes; whose signature it is, tells: ksm-edge verify PACK --public PUBLIC.pem"
HELP = "show what a task pack holds and where its bytes go"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("packs", metavar="PACK", nargs="+", help="task pack (.ksm)")
    parser.add_argument("-v", "--verbose", action="store_true", help="also the share of kernels kept in each layer")
    add_json(parser)


def run(args: argparse.Namespace) -> int:
    from ksm_edge.pack.files import load_pack_and_bytes

    reports = [describe(path, *load_pack_and_bytes(path)) for path in args.packs]
    if args.json:
        print(json.dumps(reports[0] if len(reports) == 1 else {"packs": reports}))
        return 0
    print("\n\n".join(_as_text(report, args.verbose) for report in reports))
    return 0


def describe(path: str, pack: Pack, data: bytes) -> dict[str, Any]:
    """Everything that `--json` says of a pack."""
    from ksm_edge.pack.budget import budget

    parts = budget(data)
    layers = [_layer(pack, name) for name in pack.layers]
    kernels, scores = (sum(layer[key] for layer in layers) for key in ("kernels", "scores"))
    return {
        "path": str(path),
        "task": pack.task,
        "classes": list(pack.classes),
        "backbone": pack.recipe,
        "backbone_digest": pack.backbone,
        "granularity": pack.granularity,
        "soft": pack.soft,
        "statistics": pack.statistics,
        "input_size": pack.input.size,
        "fused_digest": pack.fused_digest,
        "record": dict(pack.record),
        "signed": parts["signature"] > 0,
        "pack_bytes": len(data),
        "part_bytes": parts,
        "kernels": kernels,
        "kept_share": sum(layer["kept"] for layer in layers) / scores if scores else 1.0,
        "amplified_share": sum(layer["amplified"] for layer in layers) / scores if scores else 0.0,
        "bits_per_kernel": 8 * (parts["keep_bits"] + parts["scales"]) / kernels if kernels else 0.0,
        "keep_bits_per_kernel": 8 * parts["keep_bits"] / kernels if kernels else 0.0,
        "layers": layers,
    }


def _layer(pack: Pack, name: str) -> dict[str, Any]:
    import math

    from ksm_edge.mask import score_shape

    O, I, *_ = shape = pack.weight_shapes[name]
    mask = pack.layers[name].mask
    scores = math.prod(score_shape(shape, pack.granularity))
    kept = scores - (0 if mask is None else mask.cut.size)
    amplified = 0 if mask is None else int((mask.cut_scale > 1).sum())
    return {
        "name": name,
        "weight_shape": list(shape),
        "kernels": O * I,
        "scores": scores,
        "kept": kept,
        "amplified": amplified,
    }


def _as_text(report: dict[str, Any], verbose: bool) -> str:
    classes = report["classes"]
    named = ", ".join(classes[:8]) + (", ..." if len(classes) > 8 else "")
    masks = "soft" if report["soft"] else "binary"
    lines = [
        f"{report['path']}: task {report['task']!r}, {report['pack_bytes']:,} bytes",
        f"  classes      {len(classes)}: {named}",
        f"  backbone     {report['backbone']}, digest {report['backbone_digest']}",
        f"  input        {report['input_size']} x {report['input_size']} pixels",
        f"  masks        {masks}, granularity {report['granularity']}; batch-norm statistics {report['statistics']}",
        *_mask_lines(report),
        f"  signed       {SIGNED if report['signed'] else 'no'}",
        "  bytes",
        *(f"    {part.replace('_', ' '):<11}{size:>10,}" for part, size in report["part_bytes"].items()),
    ]
    if report["record"]:
        lines += ["  training", *(f"    {key}: {_brief(value)}" for key, value in sorted(report["record"].items()))]
    if verbose:
        shares = ["kept", *(["amplified"] if report["amplified_share"] else [])]
        lines.append(f"  layers       {', '.join(f'{name} share' for name in shares)}, weight shape")
        for layer in report["layers"]:
            shape = "x".join(map(str, layer["weight_shape"]))
            parts = "".join(f"{layer[name] / layer['scores']:>8.2%}" for name in shares)
            lines.append(f"    {layer['name']:<32}{parts}  {shape}")
    return "\n".join(lines)


def _mask_lines(report: dict[str, Any]) -> list[str]:
    if not report["kernels"]:
        return ["  kept         everything: the pack names no layer, only its head is its own"]
    amplified = f", {report['amplified_share']:.2%} amplified" if report["amplified_share"] else ""
    return [
        f"  kept         {report['kept_share']:.2%} of the masks' entries, in {report['kernels']:,} kernels{amplified}",
        f"  coded in     {report['bits_per_kernel']:.3f} bits per kernel, "
        f"{report['keep_bits_per_kernel']:.3f} of them for keep bits, the rest for scales",
    ]


def _brief(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= 100 else text[:97] + "..."
