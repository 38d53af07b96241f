"""How every benchmark here measures: on which machine, in which process, with which backbone, and written where."""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Container, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ksm_edge.bundle.layers import Bundle
    from ksm_edge.pack.record import Pack

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
sys.path.insert(0, str(ROOT))  # this checkout is measured, whatever else is installed

FORMAT_VERSION = 1
KSM_EDGE = (sys.executable, "-m", "ksm_edge")
POOLS = ("OMP", "OPENBLAS", "MKL", "NUMEXPR")  # libraries with threads of their own: each has X_NUM_THREADS
WEIGHTS = {  # of the data folder, by recipe
    "mobilenet_v2": "mobilenet_v2_imagenet.safetensors",
    "resnet20_cifar10": "resnet20_cifar10.safetensors",
}


def data_folder() -> Path:
    """Real data and weights: $KSM_EDGE_DATA, or `shared/data` beside this checkout."""
    return Path(os.environ.get("KSM_EDGE_DATA") or ROOT.parent / "shared" / "data")


# The machine


def machine() -> dict[str, Any]:
    """What does not change while a benchmark runs."""
    from ksm_edge.profiler import telemetry

    return {**telemetry.machine(), "commit": _commit()}


def condition() -> dict[str, Any]:
    """What does: the time, the load, and how many cores were busy in the second just gone by."""
    from ksm_edge.profiler import telemetry

    return telemetry.condition()


def disturbance(condition: dict[str, Any]) -> list[str]:
    """A sentence for everything that makes figures doubtful."""
    from ksm_edge.profiler import telemetry

    return telemetry.warnings(condition)


def share_warning(name: str, shares: Sequence[float]) -> list[str]:
    """A sentence where single-threaded loops did not get a whole core; `shares`: CPU time over wall time."""
    from ksm_edge.profiler import telemetry

    return telemetry.share_warnings(name, shares)


def _commit() -> str | None:
    """HEAD, with -dirty where tracked files other than results differ from it; None outside a git checkout."""
    git = ["git", "-C", str(ROOT)]
    try:
        head = subprocess.run([*git, "rev-parse", "--short=12", "HEAD"], capture_output=True, text=True, check=True)
        changes = [*git, "diff", "--quiet", "HEAD", "--", ".", ":(exclude)benchmarks/results", ":(exclude)README.md"]
        return head.stdout.strip() + ("-dirty" if subprocess.run(changes, check=False).returncode else "")
    except (OSError, subprocess.CalledProcessError):
        return None


# The process


def fresh(command: Sequence[str], threads: int | None = 1, quiet: bool = True) -> tuple[str, float]:
    """Run a command in a new process; its stdout and how many seconds it took.

    `threads` bounds the thread pools of numerical libraries, None leaves them alone. With `quiet` its stderr shows only
    if it fails, which ends the benchmark.
    """
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))}
    if threads is not None:
        environment |= {f"{pool}_NUM_THREADS": str(threads) for pool in POOLS}
    if not sys.stderr.isatty():
        environment.setdefault("TQDM_MININTERVAL", "60")  # in a log, every update of a progress bar is a line
    began = time.perf_counter()
    error = subprocess.PIPE if quiet else None
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, stderr=error, text=True, check=False)
    seconds = time.perf_counter() - began
    if done.returncode:
        raise SystemExit(f"exit status {done.returncode} from {' '.join(command)}\n{done.stderr or ''}".rstrip())
    return done.stdout, seconds


def fresh_json(command: Sequence[str], threads: int | None = 1, quiet: bool = True) -> dict[str, Any]:
    """The same for a command whose last line of stdout is one JSON object."""
    return dict(json.loads(fresh(command, threads, quiet)[0].splitlines()[-1]))


def optimizer_steps(bundle: Path, steps: int, batch: int, budget_bytes: int | None = None) -> dict[str, Any]:
    """What a fresh process of one thread measures of optimizer steps on generated photos, see `ksm_edge.profiler`."""
    given = {"batch": batch, "threads": 1, "steps": steps, "budget_bytes": budget_bytes, "classes": 10}
    with tempfile.TemporaryDirectory(prefix="ksm-edge-") as folder:
        asked, out = Path(folder, "asked.json"), Path(folder, "found.json")
        asked.write_text(json.dumps({"bundle": str(bundle), **given}))
        fresh([sys.executable, "-m", "ksm_edge.profiler.child", "adaptation", str(out), str(asked)])
        return dict(json.loads(out.read_text()))


# The backbone


def add_backbone(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--bundle", type=Path, help="a MobileNetV2 bundle (default: one made for this run)")


@contextmanager
def backbone(given: Path | None, size: int, *, random: bool = True, recipe: str = "mobilenet_v2") -> Iterator[Path]:
    """A bundle of the recipe: the given one, or a new one that is gone afterwards.

    Its weights are those of the data folder. Without, seeded random ones will do if `random`.
    """
    if given is not None:
        yield given
        return
    with tempfile.TemporaryDirectory(prefix="ksm-edge-bundle-") as folder:
        weights, bundle = data_folder() / WEIGHTS.get(recipe, recipe), Path(folder, recipe)
        if not weights.is_file():
            if not random:
                raise SystemExit(
                    f"{weights}: no such file; set KSM_EDGE_DATA to a folder that has it, or give --bundle"
                )
            print(f"{recipe} with random weights", file=sys.stderr)
            weights = _random_weights(Path(folder, "random.safetensors"), recipe)
        export = ("export", recipe, "--weights", str(weights), "--size", str(size), "--out", str(bundle))
        fresh([*KSM_EDGE, *export])
        yield bundle


def _random_weights(path: Path, recipe: str) -> Path:
    """A state dict for the recipe's graph: convs in the manner of He et al. (2015), batch-norm that does nothing."""
    import numpy as np
    import onnx
    from safetensors.numpy import save_file

    from ksm_edge.bundle.recipe import load_recipe

    rng, tensors = np.random.default_rng(0), {}
    for value in onnx.load(load_recipe(recipe).graph_path).graph.input[1:]:
        shape = tuple(side.dim_value for side in value.type.tensor_type.shape.dim)
        if len(shape) > 1:
            tensor = rng.standard_normal(shape) * np.sqrt(2 / np.prod(shape[1:]))
        else:
            tensor = np.full(shape, 1.0 if value.name.endswith(("weight", "var")) else 0.0)
        tensors[value.name] = tensor.astype(np.float32)
    save_file(tensors, path)
    return path


CUT = 0.017  # share of kernels that default settings leave cut: 1.3 to 2.3 % on the tasks of accuracy.py


def random_pack(
    bundle: Bundle,
    apart: float = CUT,
    classes: Sequence[str] = ("a", "b"),
    *,
    masked: Container[str] | None = None,
    amplify: bool = False,
) -> Pack:
    """Masks and batch-norm as a short training leaves them; what the values are does not matter to the time.

    `apart`: the share of kernels that leave 1, in the layers `masked` (all); with `amplify` half of them grow.
    """
    import numpy as np

    from ksm_edge.mask import INITIAL_SCORE, THRESHOLD, score_shape, soft_mask
    from ksm_edge.pack.record import LayerState, Pack

    rng, layers = np.random.default_rng(0), {}
    for layer in bundle.layers:
        if masked is not None and layer.name not in masked:
            continue
        shape, filters = score_shape(layer.weight_shape, "kernel"), layer.weight_shape[0]
        score = np.where(rng.random(shape) < apart, rng.uniform(0, THRESHOLD, shape), INITIAL_SCORE).astype(np.float32)
        gamma, beta = (rng.normal(0, 0.01, filters).astype(np.float32) for _ in range(2))
        if amplify:
            score = np.where(rng.random(shape) < 0.5, score, np.float32(2 * INITIAL_SCORE) - score)
        mask = soft_mask(score, amplify=amplify)
        layers[layer.name] = LayerState(mask, gamma * layer.has_norm, beta)
    return Pack(
        task="random",
        classes=tuple(classes),
        backbone=bundle.digest,
        recipe=bundle.recipe,
        granularity="kernel",
        soft=True,
        statistics="frozen",
        input=bundle.input,
        layers=layers,
        weight_shapes={layer.name: layer.weight_shape for layer in bundle.layers if layer.name in layers},
        head_weight=np.zeros((len(classes), bundle.features), np.float32),
        head_bias=np.zeros(len(classes), np.float32),
        record={},
        fused_digest="",
        golden_logits=np.zeros((0, len(classes)), np.float32),
    )


# The record


@dataclass
class Record:
    """A benchmark's raw values with the machine's state, and what they say in short."""

    benchmark: str
    question: str
    settings: dict[str, Any]
    machine: dict[str, Any] = field(default_factory=machine)
    before: dict[str, Any] = field(default_factory=condition)
    after: dict[str, Any] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)
    runs: list[dict[str, Any]] = field(default_factory=list)
    summary: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.warn(disturbance(self.before))

    def warn(self, sentences: Sequence[str]) -> None:
        """Shown at once, and kept."""
        self.warnings += sentences
        for sentence in sentences:
            print(f"WARNING {sentence}", file=sys.stderr)

    def save(self, out: Path | None) -> None:
        """What there is so far, beside the file that there is to be: hours are not lost with the rest."""
        if out is not None:
            write(_unfinished(out), {"version": FORMAT_VERSION, **vars(self)})

    def finish(self, out: Path | None) -> None:
        """Look at the machine once more, and write the file if there is to be one."""
        self.after = condition()
        self.warn(disturbance(self.after))
        if out is not None:
            write(out, {"version": FORMAT_VERSION, **vars(self)})
            _unfinished(out).unlink(missing_ok=True)
            print(f"\nraw values: {out}")
        else:
            print("\nnot written: --quick is for a look; give --out FILE to keep it")


def _unfinished(out: Path) -> Path:
    return out.with_suffix(".unfinished.json")


def add_output(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--quick", action="store_true", help="few repetitions: nothing is written without --out")
    parser.add_argument("--out", type=Path, help="JSON file to write (default: benchmarks/results/NAME.json)")


def output(options: argparse.Namespace, name: str) -> Path | None:
    """Where this run's values go; nowhere for a quick look."""
    if options.out is not None:
        return Path(options.out)
    return None if options.quick else RESULTS / f"{name}.json"


def write(path: Path, content: dict[str, Any]) -> None:
    """As JSON, whole or not at all; each list of numbers on one line."""
    from ksm_edge.atomic import atomic_write

    text = json.dumps(content, indent=1)
    text = re.sub(r"\[[\s\d.,eE+-]+\]", lambda found: re.sub(r"\s+", " ", found[0]), text)
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as file:
        file.write(text.encode() + b"\n")


def read(path: Path) -> dict[str, Any]:
    """A file of `write`; refuses one of another format version."""
    content: dict[str, Any] = json.loads(path.read_text())
    if content.get("version") != FORMAT_VERSION:
        raise SystemExit(
            f"{path}: format version {content.get('version')}, this script knows {FORMAT_VERSION}; measure again"
        )
    return content


def print_table(rows: Sequence[Sequence[str]]) -> None:
    """Columns aligned, the first row above a line."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    for number, row in enumerate(rows):
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
        if number == 0:
            print("  ".join("-" * width for width in widths))
