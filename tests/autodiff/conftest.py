"""Which of the loops in C the operators run with."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from ksm_edge import native


def every_kind() -> list[str]:
    """Those that the processor here can run; none where nothing was compiled."""
    if native.operators is None:
        return []
    from ksm_edge import _operators

    return list(_operators.loops())


@pytest.fixture(params=every_kind() or [pytest.param("", marks=pytest.mark.skip("installed without a C compiler"))])
def loops(request: pytest.FixtureRequest) -> Iterator[str]:
    """One kind after the other, whichever is the widest."""
    from ksm_edge import _operators

    _operators.run_with(request.param)
    assert _operators.running() == request.param
    yield request.param
    _operators.run_with(every_kind()[0])
