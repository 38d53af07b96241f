"""matplotlib, where it is there, so that the same figures give the same files."""

from __future__ import annotations

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
