"""`ksm-edge devices`."""

from __future__ import annotations

import argparse
import json

import pytest

from ksm_edge.cli import devices
from ksm_edge.device import device_names, this_machine


def answer(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    parser = argparse.ArgumentParser()
    devices.add_arguments(parser)
    assert devices.run(parser.parse_args(arguments)) == 0
    return capsys.readouterr().out


def test_devices_lists_every_profile_and_marks_this_machine(capsys: pytest.CaptureFixture[str]) -> None:
    lines = answer(capsys).splitlines()
    for name in device_names():
        assert any(line[2:].startswith(f"{name} ") for line in lines)
    (marked,) = [line for line in lines if line.startswith("* ") and "this machine." not in line]
    assert marked.split()[1] == this_machine().name


def test_devices_as_json_is_one_object_with_every_field(capsys: pytest.CaptureFixture[str]) -> None:
    report = json.loads(answer(capsys, "--json"))
    assert report["this_machine"] == this_machine().name
    assert [device["name"] for device in report["devices"]] == list(device_names())
    emulated = {device["name"]: device["emulated"] for device in report["devices"]}
    assert not emulated[this_machine().name]
    assert all("memory_budget_bytes" in device for device in report["devices"])
