"""Which runtime learns, on how many threads, and where it cannot."""

from __future__ import annotations

import importlib.util

import pytest

from ksm_edge.cli import adapt_options
from ksm_edge.errors import UnsupportedError, UsageError
from ksm_edge.runtimes import engine as module
from ksm_edge.runtimes.engine import ENGINES, Engine


class FakeSession:
    def __init__(self, graph: object, bound: object, threads: int) -> None:
        self.threads, self.besides = threads, 0

    def beside(self) -> FakeSession:
        self.besides += 1
        return FakeSession(None, None, self.threads)


@pytest.mark.parametrize(("threads", "count", "each"), [(1, 1, 1), (4, 1, 4), (4, 2, 3), (4, 3, 2), (4, 4, 1)])
def test_threads_that_are_no_workers_own_help_all(
    threads: int, count: int, each: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """ONNX Runtime counts the thread that calls: `count` of them, and each - 1 that the sessions share."""
    monkeypatch.setattr(module, "GradientSession", FakeSession)
    first = Engine(threads=threads, workers=count).open(None, None, {}).first  # type: ignore[arg-type]
    assert first.threads == each  # type: ignore[attr-defined]
    assert first.besides == count - 1  # type: ignore[attr-defined]
    assert count + each - 1 == threads


def test_the_command_offers_every_engine() -> None:
    assert adapt_options.ENGINES == ENGINES


def test_another_runtime_cannot_learn() -> None:
    with pytest.raises(UsageError, match="'reference' cannot learn: choose from onnxruntime, pytorch, cuda"):
        Engine("reference")


def test_one_that_is_not_there_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    Engine().check()
    for name, advice in (("pytorch", "pip install"), ("cuda", "install NVIDIA's build")):
        with pytest.raises(UnsupportedError, match=f"torch is not installed.*: {advice}"):
            Engine(name).check()


@pytest.mark.torch
def test_without_a_gpu_cuda_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    torch = pytest.importorskip("torch")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    Engine("pytorch").check()
    with pytest.raises(UnsupportedError, match="finds no CUDA GPU here"):
        Engine("cuda").check()
