"""What `ksm-edge adapt` says: the first lines, and the report of a finished training as JSON or text."""

from __future__ import annotations

import argparse
import shlex
import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ksm_edge.adapt.journey import Adapted
    from ksm_edge.bundle.layers import Bundle
    from ksm_edge.data.image_set import ImageSet
    from ksm_edge.device import Device


def say_defaults(
    args: argparse.Namespace, device: Device, bundle: Bundle, images: ImageSet, threads: int, budget: int | None
) -> None:
    """The first lines: what runs, and which of it nobody asked for."""
    from ksm_edge.limits import enforced_by

    say = lambda text: print(text, file=sys.stderr)  # noqa: E731
    if args.data is None or args.bundle == "embedded":
        what = [f"task {images.name!r} (scikit-learn's handwritten digits)"] if args.data is None else []
        what += [f"backbone {bundle.recipe!r}"] if args.bundle == "embedded" else []
        say(f"Embedded default: {' and '.join(what)}, as none was given.")
    where = " (EMULATED on this machine: its threads and memory, not its speed)" if device.is_emulated else ""
    promised = "no memory budget" if budget is None else f"memory budget {budget >> 20} MiB"
    held = f", held by a {enforced_by()}" if enforced_by() else ""
    say(f"Device    {device.title}{where}; threads {threads}, {promised}{held}")
    say(f"Backbone  {bundle.recipe}, {len(bundle.layers)} layers, input {bundle.input.size}x{bundle.input.size}")
    if args.tune and not args.resume:
        say("Tuning    which forms of the computation are the fastest here: the first time takes a minute or a few")


def report_of(device: Device, bundle: Bundle, images: ImageSet, result: Adapted, wall_seconds: float) -> dict[str, Any]:
    from ksm_edge.cli.limited import enforcement
    from ksm_edge.resident import peak_rss_bytes

    timing = result.timing
    ordered, waits = sorted(timing.step_ms), sorted(timing.wait_ms)
    return {
        "device": device.name,
        **enforcement(device, result.threads),
        "backbone": bundle.recipe,
        "backbone_digest": bundle.digest,
        "task": images.name,
        "classes": list(images.classes),
        "steps": result.steps,
        "epochs": result.epochs,
        "best_epoch": result.best_epoch,
        "judged_epoch": result.judged_epoch,
        "parent_may_have_seen": result.parent_may_have_seen,
        "plan": result.plan,
        "validation_accuracy": result.validation_accuracy,
        "pack_path": str(result.pack_path),
        "pack_bytes": result.pack_bytes,
        "peak_rss_bytes": peak_rss_bytes(),
        "step_ms_mean": sum(ordered) / len(ordered) if ordered else None,
        "step_ms_p50": ordered[len(ordered) // 2] if ordered else None,
        "data_wait_ms_p50": waits[len(waits) // 2] if waits else None,
        "views_seconds": timing.views_ms / 1e3,
        "images_per_second": timing.images / (sum(ordered) / 1e3) if ordered else None,
        "wall_seconds": wall_seconds,
        "skipped": [{"image": source, "reason": reason} for source, reason in result.skipped],
        "history": result.history,
    }


def as_text(report: dict[str, Any], args: argparse.Namespace, result: Adapted) -> str:
    bundle = [] if args.bundle == "embedded" else ["--bundle", args.bundle]
    seeing = f", {report['views_seconds']:.0f} s to keep features" if report["views_seconds"] else ""
    # In images of two sizes steps are of two kinds, and a median is of one of them.
    usual = ("p50", "median") if args.train_scale is None else ("mean", "mean")
    step = f"{report[f'step_ms_{usual[0]}'] or 0:.0f} ms each ({usual[1]})"
    board = f"{report['device']} (emulated)" if report["emulated"] else report["device"]
    data = [args.data] if args.data else []
    following = shlex.join(["ksm-edge", "eval", report["pack_path"], *data, *bundle])
    return "\n".join(
        [
            f"Task pack  {report['pack_path']}, {report['pack_bytes'] / 1e3:.1f} kB, {len(report['classes'])} classes",
            f"Accuracy   {_accuracy(result)}",
            f"Training   {report['steps']} steps, {step}, "
            f"{report['images_per_second'] or 0:.0f} images/s{seeing}, {report['wall_seconds']:.0f} s in all",
            f"Memory     {report['peak_rss_bytes'] / 2**20:.0f} MiB peak RSS, device profile {board}",
            f"Next       {following}",
            *(
                ["Yours      ksm-edge adapt PHOTOS/   (a folder with one folder of photos per class)"]
                if not args.data
                else []
            ),
        ]
    )


def _accuracy(result: Adapted) -> str:
    if result.validation_accuracy is None:
        return "no validation split"
    judged, best = result.judged_epoch, result.best_epoch
    when = f"epoch {judged}" if judged == best else f"epoch {judged}, then learned from as well"
    seen = "; its parent may have learned from them" if result.parent_may_have_seen else ""
    return f"{result.validation_accuracy:.2%} on held-out images ({when}{seen})"
