"""The README's example for apps does what it says, on a bundle and packs that stand in for the reader's."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ksm_edge.adapt.journey import adapt
from ksm_edge.bundle.load import load_bundle
from ksm_edge.data.image_set import open_image_set
from ksm_edge.training.settings import Settings

README = Path(__file__).parents[1] / "README.md"


@pytest.fixture
def reader(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with what the example names: a bundle, two packs and a photo."""
    bundle = load_bundle("embedded")
    shutil.copytree(bundle.path, tmp_path / "mobilenet_v2.bundle", ignore=shutil.ignore_patterns("*.py", "*.md"))
    rng = np.random.default_rng(0)
    for task, classes in (("plants", ("fern", "moss")), ("insects", ("ant", "bee", "fly"))):
        for shade, name in enumerate(classes):
            folder = tmp_path / task / name
            folder.mkdir(parents=True)
            for index in range(3):
                pixels = rng.integers(0, 40, (32, 32, 3)) + 80 * shade
                Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{index}.png")
        images = open_image_set(tmp_path / task)
        adapt(bundle, images, tmp_path / f"{task}.ksm", Settings(method="head", epochs=1, batch=3))
    shutil.copy(tmp_path / "plants" / "fern" / "0.png", tmp_path / "new.jpg")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_app_example_prints_answers_of_both_tasks(reader: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (example,) = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    exec(compile(example, "README.md", "exec"), {})
    tasks = {line.split()[0] for line in capsys.readouterr().out.splitlines()}
    assert tasks == {"plants", "insects"}
