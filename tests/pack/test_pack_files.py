from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from tiny import tiny_bundle, tiny_pack

from ksm_edge.errors import DamagedFileError, FileError, WrongBackboneError
from ksm_edge.pack.files import load_pack, require_backbone, save_pack
from ksm_edge.pack.format import encode


def test_a_saved_pack_is_loaded_and_its_size_told(tmp_path: Path) -> None:
    size = save_pack(tiny_pack(), tmp_path / "a.ksm")
    assert size == (tmp_path / "a.ksm").stat().st_size
    assert encode(load_pack(tmp_path / "a.ksm")) == (tmp_path / "a.ksm").read_bytes()


def test_an_error_begins_with_the_path(tmp_path: Path) -> None:
    path = tmp_path / "broken.ksm"
    path.write_bytes(encode(tiny_pack())[:-3])
    with pytest.raises(DamagedFileError, match=f"^{path}: "):
        load_pack(path)


def test_what_is_not_there_or_no_file_is_a_file_error(tmp_path: Path) -> None:
    with pytest.raises(FileError, match=r"absent\.ksm: cannot be read as a pack: No such file"):
        load_pack(tmp_path / "absent.ksm")
    with pytest.raises(FileError, match="cannot be read as a pack"):
        load_pack(tmp_path)


def test_a_pack_of_another_backbone_is_refused_naming_both(tmp_path: Path) -> None:
    other = tiny_bundle(tmp_path, seed=1)
    with pytest.raises(WrongBackboneError) as caught:
        require_backbone(tiny_pack(), other)
    message = str(caught.value)
    assert f"{0:064x}" in message
    assert f"{1:064x}" in message
    assert message.count("tiny") >= 2
    assert "--bundle" in message
    assert caught.value.exit_code == 3


def test_a_pack_of_this_backbone_is_accepted(tmp_path: Path) -> None:
    require_backbone(tiny_pack(), tiny_bundle(tmp_path))


def test_shapes_that_are_not_the_backbones_are_damage_whatever_the_digest_says(tmp_path: Path) -> None:
    bundle = tiny_bundle(tmp_path)
    pack = tiny_pack()
    with pytest.raises(DamagedFileError, match="layer stem: shape"):
        require_backbone(replace(pack, weight_shapes={**pack.weight_shapes, "stem": (8, 3, 1, 1)}), bundle)
    with pytest.raises(DamagedFileError, match=r"layer odd: .* the backbone has None"):
        require_backbone(replace(pack, weight_shapes={**pack.weight_shapes, "odd": (1, 1, 1, 1)}), bundle)
    with pytest.raises(DamagedFileError, match="takes 11 features, the backbone gives 10"):
        require_backbone(replace(pack, head_weight=np.zeros((3, 11), np.float32)), bundle)


def test_a_pack_learned_on_other_images_is_refused_naming_both(tmp_path: Path) -> None:
    bundle = tiny_bundle(tmp_path)
    pack = replace(tiny_pack(), backbone=bundle.digest)
    require_backbone(pack, bundle)
    smaller = replace(pack, input=replace(pack.input, size=8))
    with pytest.raises(
        WrongBackboneError, match=r"learned on images of 8 px cropped from 18.*takes 16 px cropped from 18"
    ):
        require_backbone(smaller, bundle)
