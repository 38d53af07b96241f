"""A torch module's inference graph without its weights, their names those of the state dict."""

from __future__ import annotations

import copy
import io
import warnings

import onnx
import torch

from ksm_edge.bundle.freeze import OPSET


def weightless_graph(module: torch.nn.Module, size: int = 64, end: str | None = None) -> onnx.ModelProto:
    """Trace `module` on an image (1, 3, size, size) in eval mode; batch-norm stays, parameters become graph inputs.

    The graph maps `image` (N, 3, H, W) to `output`, that of the submodule `end` if given. The module itself is left
    as it is.
    """
    traced = _distinct(module).eval()
    if end is not None:
        _end_at(traced, end)
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        # The TorchScript exporter is deprecated in favour of one that folds batch-norm and renames parameters.
        warnings.simplefilter("ignore")
        torch.onnx.export(
            traced,
            (torch.zeros(1, 3, size, size),),
            buffer,
            dynamo=False,
            export_params=False,
            do_constant_folding=False,
            training=torch.onnx.TrainingMode.PRESERVE,  # EVAL would fold batch-norm
            opset_version=OPSET,
            input_names=["image"],
            output_names=["output"],
            dynamic_axes={"image": {0: "N", 2: "H", 3: "W"}, "output": {0: "N"}},
        )
    return _tidy(onnx.load_from_string(buffer.getvalue()))


def _distinct(module: torch.nn.Module) -> torch.nn.Module:
    """A copy with random tensors: the exporter merges parameters of equal content, such as a new batch-norm's bias and
    running mean, both zeros, and the state dict's names with them."""
    module = copy.deepcopy(module).cpu().float()
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        for tensor in [*module.parameters(), *module.buffers()]:
            if tensor.is_floating_point():
                tensor.uniform_(0.5, 1.5)
    return module


def _end_at(module: torch.nn.Module, end: str) -> None:
    """Make a submodule's output the module's own."""
    taken: dict[str, torch.Tensor] = {}
    module.get_submodule(end).register_forward_hook(lambda _module, _inputs, out: taken.update(out=out))
    whole = module.forward

    def forward(image: torch.Tensor) -> torch.Tensor:
        whole(image)
        return taken["out"]

    module.forward = forward


def _tidy(model: onnx.ModelProto) -> onnx.ModelProto:
    """Drop what says nothing, and what changes from one release of torch to the next: versions, traces, long names.

    Nodes keep their names (they are the module's), tensors between them become numbers.
    """
    model.producer_version = ""
    del model.graph.value_info[:]
    del model.metadata_props[:]
    short = {value.name: value.name for value in model.graph.output}
    for node in model.graph.node:
        node.doc_string = ""
        del node.metadata_props[:]
        node.input[:] = [short.get(name, name) for name in node.input]
        for name in node.output:
            short.setdefault(name, str(len(short)))
        node.output[:] = [short[name] for name in node.output]
        if node.op_type == "Constant":
            node.name = ""
    return model
