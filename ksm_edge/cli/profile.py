"""`ksm-edge profile`: measure this machine, compare two measurements, predict boards that are not here."""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import replace
from pathlib import Path

from ksm_edge.cli.arguments import add_bundle, add_device, add_json, add_threads, byte_size, natural, positive

HELP = "measure time and memory of a backbone and tasks here, or predict them for boards"
USUAL = {"runs": 500, "processes": 5, "steps": 20}
QUICK = {"runs": 40, "processes": 2, "steps": 3}
DEFAULT_IMAGES, DEFAULT_KERNELS = 500, "onnxruntime"  # of the task that is predicted


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "packs", nargs="*", type=Path, metavar="PACK", help="tasks to measure beside the plain backbone"
    )
    add_bundle(parser)
    add_device(parser)
    add_threads(parser)
    parser.add_argument(
        "--memory-budget", type=byte_size, metavar="SIZE", help="such as 256MiB (default: the device's)"
    )
    parser.add_argument("--runs", type=positive, metavar="N", help=f"timed inferences (default: {USUAL['runs']})")
    parser.add_argument(
        "--processes", type=positive, metavar="N", help=f"fresh ones for these (default: {USUAL['processes']})"
    )
    parser.add_argument("--batch", type=positive, metavar="N", help="images per optimizer step (default: the device's)")
    parser.add_argument(
        "--steps", type=natural, metavar="N", help=f"timed optimizer steps, 0: none (default: {USUAL['steps']})"
    )
    parser.add_argument("--quick", action="store_true", help="few repetitions: for a look, not for a comparison")
    parser.add_argument("--out", type=Path, metavar="FILE.json", help="write all raw values")
    parser.add_argument("--plot", type=Path, metavar="FOLDER", help="draw latency, memory and operators, PNG and SVG")
    parser.add_argument("--compare", nargs=2, type=Path, metavar=("A", "B"), help="ratios of two files of --out")
    parser.add_argument("--predict", nargs="+", metavar="DEVICE", help="measure nothing: what these boards would take")
    parser.add_argument(
        "--kernels",
        choices=("onnxruntime", "ncnn", "pytorch"),
        help="whose kernels --predict is of: those that would run here (onnxruntime, the default), or an engine that "
        "others measured",
    )
    parser.add_argument("--images", type=positive, metavar="N",
                        help=f"to learn from, of --predict (default: {DEFAULT_IMAGES})")  # fmt: skip
    parser.add_argument("--epochs", type=positive, metavar="N",
                        help="passes over them, of --predict (default: as adapt)")  # fmt: skip
    add_json(parser)


def run(args: argparse.Namespace) -> int:
    from ksm_edge.device import HOST
    from ksm_edge.errors import UsageError

    if (args.compare or args.predict) and (args.device != HOST or args.out or args.plot or args.packs):
        raise UsageError("--compare and --predict measure nothing: they take no pack, --device, --out or --plot")
    if not args.predict and (args.images or args.epochs or args.kernels):
        raise UsageError("--images, --epochs and --kernels are of --predict, which is not asked for")
    if args.compare:
        return _compare(args)
    if args.predict:
        return _predict(args)
    return _measure(args)


# Measuring


def _measure(args: argparse.Namespace) -> int:
    from ksm_edge.atomic import require_writable
    from ksm_edge.bundle.load import load_bundle
    from ksm_edge.cli.adapt import available_threads, memory_budget
    from ksm_edge.cli.limited import enforcement
    from ksm_edge.cli.profile_report import measured
    from ksm_edge.device import HOST, Device, this_machine
    from ksm_edge.profiler.files import save_profile
    from ksm_edge.profiler.plots import plot_profile, require_plots
    from ksm_edge.profiler.profile import measure_profile

    if args.out is not None:
        require_writable(args.out)
    if args.plot is not None:
        require_plots(args.plot)
    device = this_machine() if args.device == HOST else Device.load(args.device)
    bundle = load_bundle(args.bundle)
    threads = args.threads or available_threads(device)
    repeated = {name: getattr(args, name) for name in USUAL if getattr(args, name) is not None}
    repeated = {**(QUICK if args.quick else USUAL), **repeated}
    result = measure_profile(
        bundle,
        args.packs,
        threads=threads,
        **repeated,
        batch=args.batch or device.batch,
        budget_bytes=memory_budget(device) if args.memory_budget is None else args.memory_budget,
        provenance={"device": device.name, **enforcement(device, threads)},
        progress=lambda text: print(f"measuring {text}", file=sys.stderr),
    )
    if args.out is not None:
        save_profile(result, args.out)
    if args.json:
        print(json.dumps({name: value for name, value in result.items() if name not in ("inference", "adaptation")}))
    else:
        print("\n".join(measured(result, device.title)))
    for warning in result["warnings"]:
        print(f"WARNING {warning}", file=sys.stderr)
    for path in plot_profile(result, args.plot) if args.plot is not None else ():
        print(path, file=sys.stderr)
    return 0


# Comparing


def _compare(args: argparse.Namespace) -> int:
    from ksm_edge.cli.profile_report import compared
    from ksm_edge.profiler.files import compare_profiles, load_profile

    found = compare_profiles(*map(load_profile, args.compare))
    if args.json:
        print(json.dumps(found))
        return 0
    print("\n".join(compared(found)))
    return 0


# Predicting


def _predict(args: argparse.Namespace) -> int:
    from ksm_edge.bundle.load import load_bundle
    from ksm_edge.cli.profile_report import predicted
    from ksm_edge.device import HOST, Device, this_machine
    from ksm_edge.profiler.predict import predict
    from ksm_edge.training.settings import Settings, usual_epochs

    bundle, found = load_bundle(args.bundle), []
    images, kernels = args.images or DEFAULT_IMAGES, args.kernels or DEFAULT_KERNELS
    for name in args.predict:
        device = this_machine() if name == HOST else Device.load(name)
        if args.memory_budget is not None:
            device = replace(device, memory_budget_bytes=args.memory_budget)
        settings = Settings(batch=args.batch or device.batch, epochs=args.epochs or usual_epochs(images))
        options = {"kernels": kernels, "threads": args.threads}
        found.append(predict(bundle, device, images=images, settings=settings, **options))
    if args.json:
        work = {"backbone": bundle.digest, "recipe": bundle.recipe, "size": bundle.input.size}
        work |= {"images": images, "epochs": settings.epochs}
        print(json.dumps({"predicted": True, "work": work, "devices": [one.as_json() for one in found]}))
        return 0
    lines = predicted(found, bundle.recipe, bundle.input.size, images, settings.epochs)
    print("\n".join(lines))
    return 0
