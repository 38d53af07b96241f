"""The examples for apps do what they say, on a bundle and packs that stand in for the reader's."""

from __future__ import annotations

import json
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
PAGE = Path(__file__).parents[1] / "docs" / "app.md"


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


def test_the_whole_app_runs_every_photo_through_every_task_and_goes_on_after_bad_files(
    reader: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (example,) = re.findall(r"<!-- app -->\n```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    assert example.count("\n") <= 45
    photos = reader / "photos"
    photos.mkdir()
    for index, source in enumerate(sorted(reader.glob("plants/*/*.png"))[::3]):
        shutil.copy(source, photos / f"{index}.png")
    (photos / "broken.jpg").write_bytes(b"no image")
    (photos / "notes.txt").write_text("no photo")
    (reader / "broken.ksm").write_bytes(b"no pack")
    app: dict = {"__name__": "app"}
    exec(compile(example, PAGE.name, "exec"), app)
    app["main"]("mobilenet_v2.bundle", ".", "photos", "answers.jsonl", rounds=2)
    said = capsys.readouterr().err
    assert "broken.ksm" in said
    assert "broken.jpg" in said
    answers = [json.loads(line) for line in (reader / "answers.jsonl").read_text().splitlines()]
    assert [answer["photo"] for answer in answers] == ["0.png", "1.png"]
    assert all(answer.keys() == {"photo", "plants", "insects"} for answer in answers)
