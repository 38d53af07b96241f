"""What a machine tells of its state, read from made-up files of boards that are not here."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from ksm_edge.profiler import telemetry
from ksm_edge.profiler.telemetry import condition, machine, pmic_watts, throttle_flags, warnings

QUIET: dict[str, Any] = {"time": "now", "load_average": (0.1, 0.1, 0.1), "busy_cores": 0.0}


def write(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


@pytest.fixture(autouse=True)
def _no_vcgencmd(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(telemetry, "_vcgencmd", lambda *words: "")


def test_what_a_machine_does_not_tell_is_left_out(tmp_path: Path) -> None:
    assert condition(0.01, tmp_path).keys() == {"time", "load_average", "busy_cores"}


def test_a_boards_sensors_are_read(tmp_path: Path) -> None:
    root = write(
        tmp_path,
        {
            "sys/devices/system/cpu/cpufreq/policy0/scaling_cur_freq": "1800000\n",
            "sys/devices/system/cpu/cpufreq/policy0/scaling_governor": "ondemand\n",
            "sys/class/thermal/thermal_zone0/type": "cpu-thermal\n",
            "sys/class/thermal/thermal_zone0/temp": "48312\n",
            "sys/class/thermal/thermal_zone1/type": "asleep\n",
            "proc/meminfo": "SwapTotal: 100 kB\nSwapFree: 60 kB\n",
            "sys/bus/i2c/drivers/ina3221/1-0040/hwmon/hwmon3/in1_label": "VDD_IN\n",
            "sys/bus/i2c/drivers/ina3221/1-0040/hwmon/hwmon3/in1_input": "5000\n",
            "sys/bus/i2c/drivers/ina3221/1-0040/hwmon/hwmon3/curr1_input": "1200\n",
            "sys/bus/i2c/drivers/ina3221/1-0040/hwmon/hwmon3/in2_label": "VDD_CPU\n",
        },
    )
    found = condition(0.01, root)
    assert (found["cpu_mhz"], found["governors"], found["swap_used_bytes"]) == ([1800], ["ondemand"], 40_960)
    assert found["temperature_celsius"] == {"cpu-thermal": 48.312}
    assert found["power_watts"] == 6.0


def test_throttling_is_told_in_words() -> None:
    assert throttle_flags("throttled=0x50005\n") == [
        "under-voltage", "throttled", "under-voltage since the start", "throttled since the start"
    ]  # fmt: skip
    assert throttle_flags("throttled=0x0") == throttle_flags("") == []


def test_the_power_controller_of_a_raspberry_pi_5_is_added_up() -> None:
    amperes = "3V3_SYS_A current(1)=0.5A\nVDD_CORE_A current(7)=2.0A\n"
    answer = f"{amperes}3V3_SYS_V volt(9)=3.3V\nVDD_CORE_V volt(15)=0.9V\nEXT5V_V volt(24)=5.1V\n"
    assert pmic_watts(answer) == pytest.approx(0.5 * 3.3 + 2 * 0.9)
    assert pmic_watts("") is None


def test_a_quiet_machine_warns_of_nothing() -> None:
    old = {**QUIET, "throttled": ["throttled since the start"], "governors": ["ondemand"]}
    assert warnings(old, old) == []


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ({"busy_cores": 1.2}, "1.2 of .* cores were busy .* stop it and run this again"),
        ({"temperature_celsius": {"cpu-thermal": 82.0}}, "cpu-thermal was at 82 degrees .* let it cool down"),
        ({"throttled": ["under-voltage"]}, "slowed down by now .under-voltage.: see to its supply"),
        ({"throttled": ["throttled since the start"]}, "slowed down by now .throttled since the start."),
        ({"governors": ["powersave"]}, "set 'performance' while you measure"),
    ],
)
def test_what_makes_figures_doubtful_is_said_with_what_to_do(state: dict[str, Any], message: str) -> None:
    (found,) = warnings(QUIET, {**QUIET, **state})
    assert re.search(message, found)


def test_a_machine_says_what_it_is() -> None:
    found = machine()
    assert found["packages"]["onnxruntime"]
    assert found["memory_bytes"] > 0
