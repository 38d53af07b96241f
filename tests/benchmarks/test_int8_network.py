"""The float32 network that int8 weights make, against what their source says of them."""

from __future__ import annotations

import csv
import io
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
from PIL import Image

from ksm_edge.bundle.layers import InputContract
from ksm_edge.data.image import to_input

CONTRACT = InputContract(128, 146, (128 / 255,) * 3, (127.5 / 255,) * 3)


@pytest.mark.parametrize(("name", "right"), [("mcunet-5fps", 133), ("mbv2-w035", 107)])
def test_it_names_what_is_in_real_photos_as_in_integers(load: Any, shared_data: Path, name: str, right: int) -> None:
    model = load("int8_network").to_onnx(shared_data / f"{name}_int8_imagenet.safetensors")
    with zipfile.ZipFile(shared_data / "imagenet_sanity.zip") as archive:
        rows = list(csv.DictReader(io.StringIO(archive.read("labels.csv").decode())))
        photos = [Image.open(io.BytesIO(archive.read(row["file"]))).convert("RGB") for row in rows]
    images = np.stack([to_input(photo, CONTRACT) for photo in photos])
    (logits,) = onnxruntime.InferenceSession(model.SerializeToString()).run(None, {"image": images})
    found = int((logits.argmax(1) == [int(row["class_index"]) for row in rows]).sum())
    assert found == pytest.approx(right, abs=8)  # of 200
