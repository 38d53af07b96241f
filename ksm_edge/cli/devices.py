"""`ksm-edge devices`: the board profiles, and which one this machine is."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict

from ksm_edge.cli.arguments import add_json
from ksm_edge.device import Device, device_names, this_machine

HELP = "list the board profiles and what this machine is"
_ROW = "{mark} {name:<22}{cores:>5}{clock:>10}{ram:>10}{budget:>12}{batch:>7}  {title}"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_json(parser)


def run(args: argparse.Namespace) -> int:
    here = this_machine()
    devices = [here if name == here.name else Device.load(name) for name in device_names()]
    if args.json:
        print(json.dumps({"this_machine": here.name, "devices": [_as_json(device) for device in devices]}))
        return 0
    header = {"cores": "cores", "clock": "MHz", "ram": "RAM MiB", "budget": "budget MiB", "batch": "batch"}
    print(_ROW.format(mark=" ", name="name", title="board", **header))
    for device in devices:
        print(_row(device, "*" if device.name == here.name else " "))
    print("* this machine. Other boards' profiles are applied to it as an emulation, and so reported.")
    print("A profile of your own: --device PATH.toml")
    return 0


def _row(device: Device, mark: str) -> str:
    return _ROW.format(
        mark=mark,
        name=device.name,
        cores=device.cores,
        clock=device.clock_mhz or "?",
        ram=device.ram_bytes >> 20,
        budget=device.memory_budget_bytes >> 20,
        batch=device.batch,
        title=device.title,
    )


def _as_json(device: Device) -> dict[str, object]:
    return {**asdict(device), "emulated": device.is_emulated}
