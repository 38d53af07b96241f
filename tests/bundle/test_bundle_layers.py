from __future__ import annotations

import pytest
from tiny import LAYERS

from ksm_edge.bundle.layers import select
from ksm_edge.errors import UsageError

NAMES = [layer.name for layer in LAYERS]


@pytest.mark.parametrize(
    ("patterns", "names"),
    [
        ("*", NAMES),
        ("dw", ["dw"]),
        ("dw, plain", ["dw", "plain"]),
        ("p*", ["project", "plain"]),
        ("project..", ["project", "grouped", "plain"]),
        ("*o*..", ["project", "grouped", "plain"]),
        ("0%..", NAMES),
        ("41%..", ["project", "grouped", "plain"]),
        ("stem, 99%..", ["stem", "plain"]),
        ("grouped..,stem", ["stem", "grouped", "plain"]),
    ],
)
def test_patterns_select_layers(patterns: str, names: list[str]) -> None:
    assert select(patterns, LAYERS) == set(names)


@pytest.mark.parametrize("pattern", ["features.1", "", "DW", "dw,", "plain...", "100%..", "41%"])
def test_a_pattern_that_selects_nothing_is_refused_naming_what_there_is(pattern: str) -> None:
    with pytest.raises(
        UsageError, match=r"no layer is called .*; the backbone's 5 are stem, dw, project, \.\.\. grouped"
    ):
        select(pattern, LAYERS)
