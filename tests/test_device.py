"""Board profiles: what they declare, how they are found, and what a wrong one says."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from ksm_edge import device
from ksm_edge.device import NUMBERS, Device, device_names, this_machine
from ksm_edge.errors import KsmEdgeError, UsageError
from ksm_edge.resources import data_folder

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

PROFILES = sorted(data_folder("ksm_edge.devices").glob("*.toml"))
OWN = """
name = "shed-camera"
title = "the camera in the shed"
cores = 4
threads = 2
clock_mhz = 0
ram_bytes = 1_000_000_000
free_ram_bytes = 700_000_000
memory_budget_bytes = 300_000_000
batch = 16
"""


@pytest.fixture
def board(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The file in which a board says what it is; absent, as on a PC, until a test writes it."""
    monkeypatch.setattr(device, "MODEL_FILE", tmp_path / "model")
    return tmp_path / "model"


@pytest.mark.parametrize("path", PROFILES, ids=lambda path: path.stem)
def test_every_number_has_a_source(path: Path) -> None:
    table = tomllib.loads(path.read_text())
    numbers = {name for name, value in table.items() if isinstance(value, (int, float)) or name == "power_modes"}
    assert set(table["sources"]) == numbers
    assert all(len(source) > 10 for source in table["sources"].values())


@pytest.mark.parametrize("path", PROFILES, ids=lambda path: path.stem)
def test_a_profile_is_named_as_its_file_and_consistent(path: Path) -> None:
    profile = Device.load(path.stem)
    assert profile.name == path.stem
    assert 0 < profile.threads <= profile.cores
    assert 0 < profile.memory_budget_bytes < profile.free_ram_bytes <= profile.ram_bytes
    for mode in profile.power_modes[:1]:  # the one that the profile is of
        assert (mode.cores, mode.clock_mhz) == (profile.threads, profile.clock_mhz)
    assert all(0 < mode.cores <= profile.cores and mode.watts > 0 for mode in profile.power_modes)


def test_the_names_and_aliases_are_those_promised_and_distinct() -> None:
    assert set(device_names()) == {
        "host",
        "jetson-agx-orin",
        "jetson-nano",
        "jetson-orin-nano",
        "jetson-tx2",
        "jetson-xavier-nx",
        "raspberry-pi-3b-plus",
        "raspberry-pi-4",
        "raspberry-pi-5",
        "raspberry-pi-zero-2w",
    }
    assert Device.load("jetson").name == "jetson-orin-nano"
    profiles = [Device.load(name) for name in device_names()]
    words = [word for profile in profiles for word in (profile.name, *profile.aliases)]
    assert len(words) == len(set(words))


def test_the_host_profile_is_filled_in_from_this_machine(board: Path) -> None:
    host = Device.load("host")
    assert host.cores == len(os.sched_getaffinity(0))
    assert set(host.sources) == set(NUMBERS)
    assert this_machine().name == "host"
    assert not host.is_emulated


def test_another_board_is_emulated(board: Path) -> None:
    assert Device.load("jetson").is_emulated


@pytest.mark.parametrize(
    ("model", "name"),
    [
        (b"Raspberry Pi Zero 2 W Rev 1.0\0", "raspberry-pi-zero-2w"),
        (b"Raspberry Pi 4 Model B Rev 1.4\0", "raspberry-pi-4"),
        (b"Raspberry Pi 5 Model B Rev 1.0\0", "raspberry-pi-5"),
        (b"Raspberry Pi 500 Rev 1.0\0", "raspberry-pi-5"),
        (b"NVIDIA Jetson Nano Developer Kit\0", "jetson-nano"),
        (b"NVIDIA Jetson Orin Nano Developer Kit\0", "jetson-orin-nano"),
        (b"NVIDIA Orin Nano Developer Kit\0", "jetson-orin-nano"),
        (b"NVIDIA Jetson AGX Orin Developer Kit\0", "jetson-agx-orin"),
        (b"NVIDIA Jetson Xavier NX Developer Kit\0", "jetson-xavier-nx"),
        (b"quill\0", "jetson-tx2"),
        (b"Raspberry Pi 3 Model B Plus Rev 1.3\0", "raspberry-pi-3b-plus"),
        (b"Raspberry Pi 3 Model B Rev 1.2\0", "host"),
    ],
)
def test_a_board_is_recognised_by_its_model_string(board: Path, model: bytes, name: str) -> None:
    board.write_bytes(model)
    assert this_machine().name == name
    assert not Device.load(name).is_emulated
    assert this_machine().ram_bytes == Device.load("host").ram_bytes


def test_an_unknown_name_lists_the_known_ones_and_the_close_ones() -> None:
    with pytest.raises(UsageError, match=r"'raspbery-pi-5' is not known; did you mean raspberry-pi-5.*Known: host, "):
        Device.load("raspbery-pi-5")
    with pytest.raises(UsageError, match=r"'toaster' is not known\. Known: .*path of a TOML profile"):
        Device.load("toaster")


def test_a_profile_of_the_users_own_is_loaded_from_its_path(tmp_path: Path) -> None:
    path = tmp_path / "shed.toml"
    path.write_text(OWN)
    own = Device.load(path)
    assert (own.name, own.threads, own.aliases) == ("shed-camera", 2, ())
    assert own.is_emulated  # it does not say how to recognise it


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (OWN.replace("cores = 4", ""), "needs cores as well"),
        (OWN.replace("cores = 4", "cores = 'four'"), "cores must be a whole number, not 'four'"),
        (OWN.replace("cores = 4", "cores = true"), "cores must be a whole number, not True"),
        (OWN.replace("batch = 16", "batch = 0"), "batch must be positive, not 0"),
        (OWN + "colour = 'green'", "colour is no field of a device profile; fields: name, title"),
        (OWN + "aliases = 'shed'", "aliases must be a list"),
        (OWN + "model_strings = [1]", "model_strings must be a list of texts"),
        (OWN + "idle_watts = nan", "idle_watts must be a finite number"),
        (OWN + "power_modes = [1]", "a power mode is a table, not 1"),
        (OWN + "[[power_modes]]\nname = 'a'\nwatts = 5", "a power mode needs cores, clock_mhz as well"),
        (OWN.replace("shed-camera", "host"), "'host' is the name of the machine at hand"),
        ("cores = ", "cannot be read as a TOML device profile"),
    ],
)
def test_an_invalid_profile_says_where_and_what(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "shed.toml"
    path.write_text(text)
    with pytest.raises(UsageError, match=message):
        Device.load(path)


def test_a_path_without_a_file_is_a_usage_error(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="there is no device profile"):
        Device.load(tmp_path / "absent.toml")


def test_a_missing_data_folder_says_where_it_was_looked_for() -> None:
    with pytest.raises(KsmEdgeError, match="install ksm-edge again"):
        data_folder("ksm_edge.absent")
