"""matplotlib, where it is there, so that the same figures give the same files."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def pyplot() -> Any:
    try:
        import matplotlib
    except ImportError:
        raise SystemExit("this needs the package matplotlib: pip install matplotlib") from None
    matplotlib.use("Agg")
    matplotlib.rcParams["svg.hashsalt"] = "ksm_edge"
    from matplotlib import pyplot

    return pyplot


def label_plainly(axis: Any, digits: Sequence[int] = (1, 2, 5)) -> None:
    """Ticks of a logarithmic x or y axis as the numbers that they are, at these first digits."""
    from matplotlib.ticker import LogLocator, NullFormatter

    axis.set_major_locator(LogLocator(subs=digits))
    axis.set_major_formatter("{x:g}")
    axis.set_minor_formatter(NullFormatter())
