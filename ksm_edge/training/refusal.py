"""What is said against a memory budget that is too small: what it is short of, and the smallest that would do, or what
has to be there before that can be known.
"""

from __future__ import annotations

from ksm_edge.autodiff.spec import GradientSpec
from ksm_edge.bundle.layers import Bundle
from ksm_edge.errors import BudgetError
from ksm_edge.limits import room_bytes
from ksm_edge.runtimes.compile import CompiledGraph, is_compiled
from ksm_edge.runtimes.trial import trusted_if_known
from ksm_edge.training.footprint import activation_bytes, compiling_bytes
from ksm_edge.training.settings import Settings


def require_compiling(bundle: Bundle, settings: Settings, spec: GradientSpec, budget_bytes: int) -> None:
    """BudgetError where not even the graph can be made by which the need of learning would be known."""
    need, room = compiling_bytes(bundle, settings), room_bytes()
    if need <= max(budget_bytes, room):
        return
    ready = trusted_if_known(spec)
    if ready is None or not is_compiled(bundle, ready):
        more = f"and there are {room >> 20}; how much learning by them needs is known behind that"
        raise BudgetError(_compiling_over_budget(bundle, need, budget_bytes, more))


def _compiling_over_budget(bundle: Bundle, need: int, budget_bytes: int, more: str) -> str:
    return (
        f"compiling the graphs of {bundle.recipe}, which is done before they are first used, needs about "
        f"{_mib(need)} MiB, {more}; the budget is {_given(budget_bytes)}. Give --memory-budget {_mib(need)}MiB or "
        "more, or take a smaller backbone."
    )


def over_budget(
    bundle: Bundle,
    settings: Settings,
    graph: CompiledGraph,
    workers: int,
    need: int,
    budget_bytes: int,
    *,
    goes_on: bool,
) -> str:
    """Of a plan that takes least and yet `need` bytes, by `graph`. `goes_on`: with a training that was begun before."""
    if need == compiling_bytes(bundle, settings):
        return _compiling_over_budget(bundle, need, budget_bytes, "more than learning by them")
    # With frozen statistics images go through one at a time, however many a step is of.
    smaller = (
        "a smaller --batch, " if settings.statistics == "batch" else "--layers NAME.. to leave the first ones out, "
    )
    if settings.train_scale == 1:
        smaller += "--train-scale 0.7 --whole-at 1, "
    elif settings.whole_at < 1:
        smaller += "--whole-at 1, "
    other = "or start anew, without --resume" if goes_on else f"{smaller}a smaller --size at export, or --method head"
    return (
        f"adapting {bundle.recipe} at {graph.spec.size}x{graph.spec.size} px in steps of {settings.batch} images "
        f"needs about {_mib(need)} MiB ({_mib(activation_bytes(graph, workers))} of it for the activations of "
        f"{workers * graph.spec.micro_batch}), the budget is {_given(budget_bytes)}. Give --memory-budget "
        f"{_mib(need)}MiB or more, {other}."
    )


def _given(budget_bytes: int) -> str:
    """A budget in bytes may be that because its unit was forgotten."""
    return f"{budget_bytes} bytes" if budget_bytes < 2**20 else f"{budget_bytes // 2**20} MiB"


def _mib(count: float) -> int:
    return -int(-count // 2**20)
