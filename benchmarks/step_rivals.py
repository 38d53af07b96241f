"""Ways to take one optimizer step, each to be timed in a process of its own by `adaptation.py`.

In torch: full fine-tuning as torchvision and eager torch have it; the same in the channels-last layout; KSM written as
the paper has it, every conv masked, with the batch's statistics; and KSM with frozen statistics in the channels-last
layout, compiled where a compiler is found. This project's trainer with its gradients by torch, on the processor and on
a GPU. Then full fine-tuning by onnxruntime-training, and by ExecuTorch's training extension, which has batch-norm
frozen, plain SGD and portable kernels: nothing else can be had.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from timing import falls, timed, traced

CLASSES, RATE = 10, 1e-4
BATCHES_SEEN = 8  # put through the front at once, whose session opens once for all
OURS, SMALLEST, FULL = "ksm_edge", "ksm_edge, least memory", "torch, full fine-tuning"
FASTEST = "ksm_edge, --fast"
STANDARD = "ksm_edge, standard operators"  # as where no compiler was found
TUNED = "ksm_edge, --tune"  # by the forms that are the fastest on this machine
NO_STEM = "ksm_edge, all but the stem"  # 7 x 7 over RGB in ResNets, with a max pool behind it
OURS_IN_TORCH, OURS_ON_GPU = "ksm_edge, by torch", "ksm_edge, by torch on a GPU"
CHANNELS_LAST = "torch, full fine-tuning, channels-last"
COMPILED = "torch, KSM, frozen statistics, channels-last, compiled"
ORT_TRAINING, EXECUTORCH = "onnxruntime-training, full fine-tuning", "ExecuTorch training, full fine-tuning"

# recipe, size, batch, threads, steps, bundle; layers, views, product_bits, train_scale, whole_at of ours;
# onnxruntime_training; trace
Given = dict[str, Any]
Found = dict[str, Any]


def flop_rate() -> float:
    """Of a large matrix product in numpy, the best of a few."""
    import numpy as np

    side = 1024
    a, b = (np.random.default_rng(seed).standard_normal((side, side), np.float32) for seed in (0, 1))
    best = float("inf")
    for _ in range(8):
        began = time.perf_counter()
        a @ b
        best = min(best, time.perf_counter() - began)
    return 2 * side**3 / best


def _seen(step: Callable[[], float], given: Given) -> Found:
    """Its steps' times, or what one of them holds in memory when."""
    return {"trace": traced(step)} if given.get("trace") else timed(step, given["steps"])


def _ours(
    given: Given,
    *,
    smallest: bool = False,
    stem: bool = True,
    runtime: str = "onnxruntime",
    operators: bool = True,
    tune: bool = False,
) -> Found:
    from ksm_edge import native
    from ksm_edge.errors import UnsupportedError
    from ksm_edge.resident import use_compact_heap
    from ksm_edge.training.trainer import Trainer

    use_compact_heap()
    if not operators:
        native.operators = None
    try:
        bundle, plan = _planned(given, smallest=smallest, stem=stem, runtime=runtime, tune=tune)
    except UnsupportedError as error:
        return {"absent": str(error)}
    trainer = Trainer(bundle, plan.graph, plan.settings, steps=1000, engine=plan.engine)  # thinned later, if at all
    choices = {**plan.choices, "recompute": plan.graph.spec.recompute}
    stages = plan.stages[-1:] if given.get("trace") else plan.stages
    found = [_of_stage(trainer, plan, each, given) for each in stages]
    last = {**found[-1], "expected_peak_bytes": plan.expected_peak_bytes, "plan": choices}
    if "step_ms" not in last:
        return last
    # A step takes what it does on the mean over the epochs.
    shares = [len(each.stage.epochs) / plan.settings.epochs for each in stages]
    together = zip(*(of_stage["step_ms"] for of_stage in found), strict=True)
    last["step_ms"] = [round(sum(s * ms for s, ms in zip(shares, each, strict=True)), 3) for each in together]
    if len(found) > 1:
        last["stages"] = [{"size": each.stage.input.size, "epochs": len(each.stage.epochs), "step_ms": one["step_ms"]}
                          for each, one in zip(stages, found, strict=True)]  # fmt: skip
    # Those of a stage that learns nothing, if there is one.
    losses = (of_stage["losses"] for of_stage in found)
    return {**last, "losses": next((each for each in losses if not falls(each)), last["losses"])}


def _of_stage(trainer: Any, plan: Any, each: Any, given: Given) -> Found:
    """Steps in a stage's images, with what its views take shared out over its epochs."""
    import numpy as np

    from ksm_edge.data.batches import Batch, parts_of_batches
    from ksm_edge.training.targets import target_rows

    trainer.go_on_with(each.graph)
    side, batch = each.stage.input.size, given["batch"]
    targets = target_rows(np.arange(batch) % CLASSES, CLASSES, 0.0)
    # Images as an adaptation has them: a part at a time, however large the batch, and made by somebody else: what is
    # waited for them does not count, as little as with the rivals, who have them all from the start.
    parts = list(parts_of_batches(np.arange(batch), batch, part=plan.micro_batch))

    def images(parts: list[np.ndarray]) -> Iterator[Batch]:
        rng = np.random.default_rng(0)  # the same ones each time
        for indices in parts:
            yield Batch(rng.standard_normal((len(indices), 3, side, side), np.float32), indices % CLASSES, indices)

    views, front_ms = None, 0.0
    if each.front is not None:
        in_front = list(parts_of_batches(np.arange(batch), batch, part=each.front.spec.micro_batch))
        views, front_ms = _views(
            trainer.bundle, plan.engine, each.front, batch, lambda: images(in_front), len(in_front)
        )
    waited_ms: list[float] = []

    def seen() -> Iterator[np.ndarray]:
        if views is None:
            yield from (part.images for part in images(parts))
        else:
            yield from (views.features(0, indices) for indices in parts)

    def step() -> float:
        found = trainer.step(seen(), targets)
        waited_ms.append(found.waited_ms if views is None else 0.0)
        return float(found.loss)

    found = _seen(step, given)
    if "step_ms" in found:
        of_views = front_ms * each.stage.views / len(each.stage.epochs)
        pairs = zip(found["step_ms"], waited_ms[-len(found["step_ms"]) :], strict=True)
        found["step_ms"] = [round(ms - waited + of_views, 3) for ms, waited in pairs]
    return found | ({} if views is None else {"front_ms": round(front_ms, 3)})


def _planned(given: Given, *, smallest: bool, stem: bool, runtime: str, tune: bool) -> tuple[Any, Any]:
    """The bundle and the plan for it; UnsupportedError where the runtime is not here."""
    from ksm_edge.bundle.load import load_bundle
    from ksm_edge.errors import BudgetError
    from ksm_edge.training.planner import make_plan
    from ksm_edge.training.settings import Settings

    bundle, budget = load_bundle(given["bundle"]), None
    rates = {"score_rate": RATE, "norm_rate": RATE, "head_rate": RATE}
    layers = given.get("layers", "*") if stem else f"{bundle.layers[1].name}.."
    more = {name: given[name] for name in ("views", "product_bits", "train_scale", "whole_at") if name in given}
    settings = Settings(batch=given["batch"], layers=layers, **more, **rates)
    if smallest:
        try:
            make_plan(bundle, CLASSES, settings, threads=given["threads"], budget_bytes=1)
        except BudgetError as error:
            budget = error.needed_bytes
            if budget is None:  # too little memory is free here to find that out
                raise
    plan = make_plan(
        bundle, CLASSES, settings, threads=given["threads"], budget_bytes=budget, runtime=runtime, tune=tune
    )
    return bundle, plan


def _views(
    bundle: Any, engine: Any, front: Any, batch: int, images: Callable[[], Iterator[Any]], parts: int
) -> tuple[Any, float]:
    """One view of each of a step's images, and the milliseconds that a step's take."""
    from ksm_edge.adapt.views import Views

    views = Views(bundle, [(front, 1)], engine, batch)
    views.fill(0, images())
    again = [next(images())] * (BATCHES_SEEN * parts)
    began = time.perf_counter()
    views.fill(0, again)
    return views, (time.perf_counter() - began) * 1e3 / BATCHES_SEEN


def _fast() -> Given:
    from ksm_edge.training.settings import FAST

    return dict(FAST)


def _in_torch(make: Callable[[Any, Given], Any], *, channels_last: bool) -> Callable[[Given], Found]:
    def measured(given: Given) -> Found:
        try:
            import torch

            network = make(torch, given)
        except ImportError as error:
            return {"absent": str(error)}
        torch.set_num_threads(given["threads"])
        torch.manual_seed(0)
        images, labels = torch.randn(given["batch"], 3, given["size"], given["size"]), torch.arange(given["batch"])
        if channels_last:
            images = images.contiguous(memory_format=torch.channels_last)
            network = network.to(memory_format=torch.channels_last)
        adam = torch.optim.Adam([p for p in network.parameters() if p.requires_grad], RATE)

        def step() -> float:
            adam.zero_grad()
            loss = torch.nn.functional.cross_entropy(network(images), labels % CLASSES)
            loss.backward()
            adam.step()
            return float(loss)

        return _seen(step, given)

    return measured


def _full(torch: Any, given: Given) -> Any:
    from ksm_edge.exporter.torchvision_shim import import_torchvision

    return getattr(import_torchvision().models, given["recipe"])(num_classes=CLASSES).train()


def _masked(torch: Any, given: Given) -> Any:
    import rivals

    from ksm_edge.bundle.load import load_bundle

    return rivals.with_masks(rivals.Network(load_bundle(given["bundle"]), CLASSES)).train()


def _masked_frozen(torch: Any, given: Given) -> Any:
    network = torch.compile(_masked(torch, given).eval())
    try:
        network(torch.zeros(1, 3, given["size"], given["size"]))
    except Exception as error:  # whatever keeps torch from compiling: most often that there is no compiler
        raise ImportError(f"torch.compile: {str(error).splitlines()[0]}") from error
    return network


def _without_dropout(torch: Any, given: Given) -> Any:
    network = _full(torch, given)
    for module in network.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    return network


def _onnxruntime_training(given: Given) -> Found:
    interpreter = given.get("onnxruntime_training")
    if not interpreter:
        return {"absent": "its interpreter was not given, see benchmarks/ort_training.py"}
    try:
        import onnx  # noqa: F401  # torch's exporter needs it
        import torch
    except ImportError as error:
        return {"absent": str(error)}
    with tempfile.TemporaryDirectory(prefix="ksm-edge-ort-") as folder:
        image = torch.randn(given["batch"], 3, given["size"], given["size"])
        torch.onnx.export(
            _without_dropout(torch, given),
            (image,),
            f"{folder}/model.onnx",
            training=torch.onnx.TrainingMode.TRAINING,
            do_constant_folding=False,
            opset_version=15,
            input_names=["image"],
            output_names=["logits"],
            dynamo=False,
        )
        more = {"rate": RATE, "classes": CLASSES}
        script = str(Path(__file__).with_name("ort_training.py"))
        try:
            for words in (("prepare", folder), ("measure", folder, json.dumps({**given, **more}))):
                done = subprocess.run([interpreter, script, *words], check=True, capture_output=True, text=True)
        except subprocess.CalledProcessError as error:
            return {"absent": error.stderr.strip().splitlines()[-1]}
        except OSError as error:
            return {"absent": str(error)}
        found: Found = json.loads(done.stdout.splitlines()[-1])
        return found


def _executorch(given: Given) -> Found:
    """One warm-up and two timed steps: a step takes a minute where others take a second."""
    if given["recipe"] != "mobilenet_v2":
        return {"absent": "minutes a step"}
    try:
        import torch
        from executorch.exir import EdgeCompileConfig, to_edge
        from executorch.extension.training import _load_for_executorch_for_training_from_buffer, get_sgd_optimizer
        from torch.export.experimental import _export_forward_backward
    except ImportError as error:
        return {"absent": str(error)}

    class WithLoss(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.network = _full(torch, given).eval()

        def forward(self, images: Any, labels: Any) -> Any:
            logits = self.network(images)
            return torch.nn.functional.cross_entropy(logits, labels), logits.detach().argmax(1)

    torch.manual_seed(0)
    inputs = torch.randn(given["batch"], 3, given["size"], given["size"]), torch.arange(given["batch"]) % CLASSES
    joint = _export_forward_backward(torch.export.export(WithLoss(), inputs, strict=False))
    program = to_edge(joint, compile_config=EdgeCompileConfig(_check_ir_validity=False)).to_executorch()
    module = _load_for_executorch_for_training_from_buffer(program.buffer)
    optimizer: Any = None

    def step() -> float:
        nonlocal optimizer
        loss, _ = module.forward_backward("forward", list(inputs))
        optimizer = optimizer or get_sgd_optimizer(module.named_parameters(), 1e-3)
        optimizer.step(module.named_gradients())
        return float(loss)

    return timed(step, 2, warm_up=1)


RIVALS: dict[str, Callable[[Given], Found]] = {
    OURS: _ours,
    SMALLEST: lambda given: _ours(given, smallest=True),
    STANDARD: lambda given: _ours(given, operators=False),
    TUNED: lambda given: _ours(given, tune=True),
    NO_STEM: lambda given: _ours(given, stem=False),
    FASTEST: lambda given: _ours({**given, **_fast()}),
    OURS_IN_TORCH: lambda given: _ours(given, runtime="pytorch"),
    OURS_ON_GPU: lambda given: _ours(given, runtime="cuda"),
    FULL: _in_torch(_full, channels_last=False),
    CHANNELS_LAST: _in_torch(_full, channels_last=True),
    "torch, KSM as the paper writes it": _in_torch(_masked, channels_last=False),
    COMPILED: _in_torch(_masked_frozen, channels_last=True),
    ORT_TRAINING: _onnxruntime_training,
    EXECUTORCH: _executorch,
}
ONCE = {COMPILED, EXECUTORCH}  # of so long a start, or step, one process is enough
ALONG_AXES = (OURS, FASTEST, FULL, CHANNELS_LAST)


def applies(rival: str, recipe: str) -> bool:
    """Whether it says something else of this network than the others do."""
    if rival in (OURS_IN_TORCH, OURS_ON_GPU):
        return recipe == "mobilenet_v2"
    return rival != NO_STEM or recipe.startswith("resnet")


def measured(rival: str, given: Given) -> Found:
    """What one process says of a rival: its steps, and how fast this machine multiplied matrices behind them."""
    found = RIVALS[rival](given)
    return found if "absent" in found else {**found, "flop_rate": flop_rate()}


if __name__ == "__main__":
    print(json.dumps(measured(sys.argv[1], json.loads(sys.argv[2]))))
