"""`ksm-edge adapt`: learn a task from a folder of images and write its pack."""

from __future__ import annotations

import argparse
import json
import shlex
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

from ksm_edge.cli.adapt_options import ENGINES, add_arguments, settings_of
from ksm_edge.cli.adapt_report import as_text, report_of, say_defaults

if TYPE_CHECKING:
    from ksm_edge.data.image_set import ImageSet
    from ksm_edge.device import Device

__all__ = ["HELP", "add_arguments", "run"]  # what `main` takes of a verb

HELP = "learn a task from a folder or zip of images, on this device, and write its task pack"
INTERRUPTED = 130


def run(args: argparse.Namespace) -> int:
    from ksm_edge.adapt.interrupt import terminated_as_interrupted
    from ksm_edge.adapt.journey import Interrupted, adapt
    from ksm_edge.bundle.load import load_bundle
    from ksm_edge.cli.progress import ProgressBar
    from ksm_edge.cores import compute_on_fast_cores
    from ksm_edge.device import HOST, Device, this_machine
    from ksm_edge.errors import UsageError

    began = time.perf_counter()
    device = this_machine() if args.device == HOST else Device.load(args.device)
    if device.is_emulated and args.runtime != ENGINES[0]:
        raise UsageError(f"{device.title} is emulated by holding its memory, which {args.runtime} knows nothing of")
    bundle = load_bundle(args.bundle)
    threads = args.threads or available_threads(device)
    compute_on_fast_cores(threads)
    budget = budget_of(args, device)
    images = _images(args.data)
    settings = settings_of(args, device, len(images.train))
    out = args.out or Path(f"{images.name}.ksm")
    say_defaults(args, device, bundle, images, threads, budget)
    try:
        with ProgressBar(replaced=out if out.exists() else None) as observer, terminated_as_interrupted():
            result = adapt(
                bundle,
                images,
                out,
                settings,
                threads=threads,
                budget_bytes=budget,
                runtime=args.runtime,
                tune=args.tune,
                resume=args.resume,
                fresh=args.fresh,
                observer=observer,
                provenance={"device": device.name, "emulated": device.is_emulated},
                parent=args.parent,
            )
    except Interrupted as stop:
        following = _resume_command(args)
        print(f"\nInterrupted. Everything is in {stop.checkpoint}; go on with:\n  {following}", file=sys.stderr)
        return INTERRUPTED
    report = report_of(device, bundle, images, result, time.perf_counter() - began)
    print(json.dumps(report) if args.json else as_text(report, args, result))
    return 0


def available_threads(device: Device) -> int:
    """The device's threads, as far as this process has fast cores for them."""
    from ksm_edge.cores import fast_cores

    return min(device.threads, len(fast_cores()))


def budget_of(args: argparse.Namespace, device: Device) -> int | None:
    """The budget that was asked for, or else the device's; none for a runtime that keeps none."""
    if args.memory_budget is None and args.runtime == ENGINES[0]:
        return memory_budget(device)
    found: int | None = args.memory_budget
    return found


def memory_budget(device: Device) -> int:
    """The device's budget; on the device itself no more than is free now."""
    import psutil

    if device.is_emulated:
        return device.memory_budget_bytes
    return min(device.memory_budget_bytes, int(psutil.virtual_memory().available))


def _images(data: str | None) -> ImageSet:
    from ksm_edge.data.digits import digits
    from ksm_edge.data.image_set import open_image_set

    images = digits() if data is None else open_image_set(data)
    for remark in images.remarks:
        print(remark, file=sys.stderr)
    return images


def _resume_command(args: argparse.Namespace) -> str:
    return shlex.join(
        ["ksm-edge", *(word for word in args.command_line if word not in ("--resume", "--fresh")), "--resume"]
    )
