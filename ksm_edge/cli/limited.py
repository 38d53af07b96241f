"""A board that is emulated has its memory held: the same command once more, in a process under the board's limit."""

from __future__ import annotations

import argparse

from ksm_edge.child import module_command
from ksm_edge.device import HOST, Device
from ksm_edge.errors import BudgetError
from ksm_edge.limits import enforced_by, run_limited

NOT_ENFORCED = ("clock", "memory bandwidth", "storage speed")


def emulation(args: argparse.Namespace) -> Device | None:
    """The board that this command is to be run as and this machine is not; None once it is, or where there is none."""
    name = getattr(args, "device", HOST)
    if name == HOST or enforced_by() is not None or getattr(args, "predict", None) or getattr(args, "compare", None):
        return None
    device = Device.load(name)
    return device if device.is_emulated else None


def run_emulated(args: argparse.Namespace, device: Device) -> int:
    """The command's exit status; BudgetError where it took more memory than the board gives it."""
    budget = getattr(args, "memory_budget", None) or device.memory_budget_bytes
    outcome = run_limited(module_command("ksm_edge", *args.command_line), budget)
    if outcome.exceeded and outcome.exit_status:
        raise BudgetError(
            f"stopped, as it took more than {device.title} has: {budget >> 20} MiB, held by a {outcome.enforced}. "
            "Give a larger --memory-budget if the board has it. What `adapt` had learned is in its checkpoint, if one "
            "was written by then: --resume goes on from there"
        )
    return outcome.exit_status


def enforcement(device: Device, threads: int) -> dict[str, object]:
    """For a report: what of an emulated board was held, and what was not."""
    if not device.is_emulated:
        return {"emulated": False}
    memory = enforced_by()
    return {
        "emulated": True,
        "enforced": {"threads": threads, **({} if memory is None else {"memory": memory})},
        "not_enforced": list(NOT_ENFORCED) if memory else [*NOT_ENFORCED, "memory"],
    }
