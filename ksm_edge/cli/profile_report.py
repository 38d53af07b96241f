"""What `ksm-edge profile` prints: a measurement, a comparison, a prediction, each as lines of text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ksm_edge.profiler.predict import Prediction

MIB = 1 << 20
COLD = ("cold_start_ms", "read_ms", "decode_ms", "fuse_ms", "session_ms", "first_run_ms")
SHOWN_OPERATORS = 5


def measured(result: Mapping[str, Any], title: str) -> list[str]:
    """A profile result; `title` is the board's."""
    work, found = result["work"], result["summary"]
    where = f"{title} (EMULATED on this machine: not its speed)" if result["emulated"] else title
    lines = [f"Device     {where}; {work['threads']} thread(s); {result['machine']['cpu']}"]
    if result["emulated"]:
        held = result["enforced"].get("memory")
        what = "threads" if held is None else f"threads, and memory by a {held}"
        lines.append(f"Enforced   {what}; not enforced: {', '.join(result['not_enforced'])}")
    lines += [f"Backbone   {work['recipe']}, {work['size']}x{work['size']} px, one image", ""]
    lines += [*_inference(found["inference"]), "", *_memory(found), ""]
    if "adaptation" in found:
        lines += _adaptation(found["adaptation"], work["batch"])
    name, raw = list(result["inference"].items())[-1]
    most = list(raw["operators_ms"].items())[:SHOWN_OPERATORS]
    return [*lines, f"Operators  {name}: " + ", ".join(f"{operator} {_number(ms)} ms" for operator, ms in most)]


def _inference(rows: Mapping[str, Any]) -> list[str]:
    head = ("inference, ms", "p50", "p95", "p99", "n", *(name.removesuffix("_ms").replace("_", " ") for name in COLD))
    table = [head]
    for name, row in rows.items():
        tail = (_number(row.get(key)) for key in ("p50_ms", "p95_ms", "p99_ms"))
        table.append((name, *tail, str(row["n"]), *(_number(row[key]) for key in COLD)))
    return aligned(table)


def _memory(found: Mapping[str, Any]) -> list[str]:
    keys = ("baseline_bytes", "peak_rss_bytes", "rss_bytes", "pss_bytes")
    rows = dict(found["inference"])
    if "adaptation" in found:
        rows["adaptation"] = found["adaptation"]
    table: list[tuple[str, ...]] = [("memory, MiB", "imports", "peak RSS", "RSS", "PSS")]
    for name, row in rows.items():
        table.append((name, *(_mib(row[key]) if key in row else "" for key in keys)))
    return aligned(table)


def _adaptation(row: Mapping[str, Any], batch: int) -> list[str]:
    parts = ", ".join(f"{name} {row[f'{name}_ms']:.0f}" for name in ("forward", "backward", "update"))
    at_once = f"{row['workers']} x {row['micro_batch']} image(s) at a time"
    return [
        f"Adaptation {row['step_ms']:.0f} ms a step of {batch} images, {row['images_per_second']:.1f} images/s: {parts}"
        f"; images made meanwhile in {row['data_ms']:.0f}",
        f"           activations {_mib(row['activation_bytes'])} MiB ({at_once}); "
        f"peak expected {_mib(row['expected_peak_bytes'])} MiB",
    ]


def compared(found: Mapping[str, Any]) -> list[str]:
    """What `compare_profiles` found."""
    lines = []
    for which, source in zip(("first", "second"), found["of"], strict=True):
        emulated = " (EMULATED on this machine: not its speed)" if source["emulated"] else ""
        lines.append(f"{which:<7} {source['device'] or 'unknown'}{emulated}; {source['cpu']}; {source['time']}")
    table: list[tuple[str, ...]] = [("", "first", "second", "second / first", f"{found['confidence']:.0%} interval")]
    for name, row in found["rows"].items():
        scale, unit = (MIB, "MiB") if name.endswith("_bytes") else (1, "ms")
        interval = "" if "interval" not in row else f"{row['interval'][0]:.3f} to {row['interval'][1]:.3f}"
        values = (f"{row[which] / scale:.2f}" for which in ("first", "second"))
        table.append((f"{name.rsplit('_', 1)[0]}, {unit}", *values, f"{row['ratio']:.3f}", interval))
    lines += ["", *aligned(table)]
    for which, source in zip(("first", "second"), found["of"], strict=True):
        lines += [f"WARNING {which}: {warning}" for warning in source["warnings"]]
    return lines


def predicted(predictions: Sequence[Prediction], recipe: str, size: int, images: int, epochs: int) -> list[str]:
    """One table of all boards, and what is to be known of it."""
    kernels = predictions[0].kernels
    table: list[tuple[str, ...]] = [
        ("device", "fits in memory?", "ms an image", "adaptation, minutes", "peak / budget, MiB", "energy, Wh")
    ]
    for one in predictions:
        latency = _ranged(one.inference_ms, one)
        fits = {True: "yes", False: "no", None: "not known"}[one.fits]
        table.append((one.device.name, fits, latency, *_adapting(one)))
    return [
        f"PREDICTED, not measured: {recipe}, {size} px; learning {images} images x {epochs} epochs",
        f"Kernels    {kernels.describes}; fitted on {kernels.fitted_on}",
        *aligned(table),
        *(f"{one.device.name}: {remark}" for one in predictions for remark in _remarks(one)),
        f"Ranges: four of five measurements of an image are expected within a factor of {kernels.spread:.2f}; that of",
        "adaptation is wider, and rests on one machine. Making images, judging, packing are left out. Energy: from the",
        "idle board, where that is known, to its power mode.",
    ]


def _adapting(one: Prediction) -> tuple[str, str, str]:
    budget, minutes, energy = _mib(one.device.memory_budget_bytes), one.adaptation_minutes, one.energy_watt_hours
    if minutes is None:
        return "", f"over / {budget}" if one.refusal else "", ""
    least = (
        "up to" if energy is None or not energy[0] else f"{energy[0]:.1f} to"
    )  # 0: the board's idle power is unknown
    watt_hours = "" if energy is None else f"{least} {energy[1]:.1f}"
    peak = "" if one.plan is None else f"{_mib(one.plan.expected_peak_bytes)} / {budget}"
    return _ranged(minutes, one, adapting=True), peak, watt_hours


def _remarks(one: Prediction) -> list[str]:
    found = [one.refusal] if one.refusal else []
    if one.device.flop_per_cycle and not one.device.runtimes:
        found.append(f"stock wheels do not run on its usual system. {' '.join(one.device.notes[:1])}")
    return found


def _ranged(value: float, one: Prediction, *, adapting: bool = False) -> str:
    low, high = one.range_of(value, adapting=adapting)
    digits = 0 if value >= 20 else 1
    return f"{value:.{digits}f} ({low:.{digits}f} to {high:.{digits}f})"


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def _mib(count: float | None) -> str:
    return "unknown" if count is None else f"{count / MIB:.0f}"


def aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """Rows of cells as lines, column under column."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
