from __future__ import annotations

from pathlib import Path

import pytest
from tiny import tiny_bundle

from ksm_edge.bundle.layers import Bundle


@pytest.fixture
def bundle(tmp_path: Path) -> Bundle:
    return tiny_bundle(tmp_path / "bundle")
