"""Full fine-tuning by onnxruntime-training, run by the interpreter of an environment that has it.

    python -m venv ort && ort/bin/pip install onnxruntime-training==1.19.2 "onnx<1.17" "numpy<2" torch
    python benchmarks/adaptation.py --onnxruntime-training ort/bin/python

Its last release; its Python package imports torch. `prepare FOLDER` makes the training graphs of FOLDER/model.onnx, and
`measure FOLDER GIVEN` times steps, GIVEN being JSON, and prints JSON.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
from timing import timed


def main() -> int:
    action, folder, *more = sys.argv[1:]
    if action == "prepare":
        prepare(Path(folder))
    else:
        print(json.dumps(measure(Path(folder), json.loads(more[0]))))
    return 0


def prepare(folder: Path) -> None:
    """Every float of the network learns but batch-norm's running statistics, which its own nodes move."""
    import onnx
    from onnxruntime.training import artifacts

    model = onnx.load(folder / "model.onnx")
    floats = [t for t in model.graph.initializer if t.data_type == onnx.TensorProto.FLOAT and t.dims]
    learned = [tensor.name for tensor in floats if "running_" not in tensor.name]
    artifacts.generate_artifacts(
        model,
        requires_grad=learned,
        frozen_params=[tensor.name for tensor in model.graph.initializer if tensor.name not in learned],
        loss=artifacts.LossType.CrossEntropyLoss,
        optimizer=artifacts.OptimType.AdamW,
        artifact_directory=str(folder),
    )


def measure(folder: Path, given: dict[str, Any]) -> dict[str, Any]:
    """One process' steps."""
    import onnxruntime
    from onnxruntime.training import api

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = given["threads"], 1
    state = api.CheckpointState.load_checkpoint(str(folder / "checkpoint"))
    module = api.Module(str(folder / "training_model.onnx"), state, device="cpu", session_options=options)
    optimizer = api.Optimizer(str(folder / "optimizer_model.onnx"), module)
    optimizer.set_learning_rate(given["rate"])
    module.train()
    shape = given["batch"], 3, given["size"], given["size"]
    images = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    labels = np.arange(given["batch"], dtype=np.int64) % given["classes"]

    def step() -> float:
        loss = module(images, labels)
        optimizer.step()
        module.lazy_reset_grad()
        return float(loss)

    return timed(step, given["steps"])


if __name__ == "__main__":
    sys.exit(main())
