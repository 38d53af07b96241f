"""What a machine is, and the state it is in: so that a figure can be believed, or not.

What a machine does not tell is left out, never guessed. Power is only what a sensor measures: the INA3221 of a Jetson,
the power controller of a Raspberry Pi 5.
"""

from __future__ import annotations

import os
import platform
import re
import subprocess
import time
from collections.abc import Sequence
from contextlib import suppress
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from ksm_edge.device import machine_model

PACKAGES = ("ksm-edge", "numpy", "onnx", "onnxruntime", "Pillow", "safetensors", "torch", "torchvision")
BUSY_CORES = 0.3  # by other programs: above this a measurement counts as disturbed
FULL_SHARE = 0.95  # of one core: a single-threaded loop that got less was kept waiting
HOT_CELSIUS = 80.0  # a Raspberry Pi slows down from here on
# Bits of `vcgencmd get_throttled`, of now and of any time since the start.
THROTTLED = {0: "under-voltage", 1: "frequency capped", 2: "throttled", 3: "at the soft temperature limit"}
SINCE_START = 16
CPUFREQ = "sys/devices/system/cpu/cpufreq/policy*"
WHOLE_BOARD = ("VDD_IN", "POM_5V_IN")  # rails of an INA3221 that feed all others, by board


def machine() -> dict[str, Any]:
    """What does not change while something is measured."""
    return {
        "model": machine_model() or None,
        "cpu": cpu_name(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "python": platform.python_version(),
        "packages": {name: _version(name) for name in PACKAGES},
    }


def condition(seconds: float = 1.0, root: Path = Path("/")) -> dict[str, Any]:
    """What does change; looks on for so many seconds how busy the cores are. `root`: of the file system to read."""
    found: dict[str, Any] = {
        "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "load_average": os.getloadavg(),
        "busy_cores": round(busy_cores(seconds), 2),
    }
    found |= {name: value for name, value in _sensed(root).items() if value}
    return found


def warnings(*conditions: dict[str, Any]) -> list[str]:
    """A sentence for everything that makes figures doubtful, each with what to do; conditions in order of time."""
    found = []
    for state in conditions:
        busy, when = state["busy_cores"], state["time"]
        if busy > BUSY_CORES:
            found.append(
                f"{busy:.1f} of {os.cpu_count()} cores were busy with something else at {when} (load average "
                f"{state['load_average'][0]:.1f}): times may be unstable; stop it and run this again"
            )
        hot = {name: value for name, value in state.get("temperature_celsius", {}).items() if value >= HOT_CELSIUS}
        if hot:
            name, value = max(hot.items(), key=lambda item: item[1])
            found.append(f"{name} was at {value:.0f} degrees Celsius at {when}: let it cool down, or give it a fan")
        # What happened before the first look is no fault of what was measured.
        before = conditions[0].get("throttled", ())
        slowed = [text for text in state.get("throttled", ()) if "since" not in text or text not in before]
        if slowed:
            found.append(
                f"the board was slowed down by {when} ({', '.join(slowed)}): see to its supply and its cooling"
            )
        if "powersave" in state.get("governors", ()):
            found.append(f"the processor's governor was 'powersave' at {when}: set 'performance' while you measure")
    return list(dict.fromkeys(found))


def share_warnings(name: str, shares: Sequence[float]) -> list[str]:
    """A sentence where single-threaded loops did not get a whole core; `shares`: CPU time over wall time."""
    if min(shares, default=1.0) >= FULL_SHARE:
        return []
    return [f"{name}: a timed loop got only {min(shares):.0%} of a core, so its times are too long; run it again"]


def cpu_name() -> str:
    """As the kernel calls the processor."""
    with suppress(OSError):
        text = Path("/proc/cpuinfo").read_text()
        if found := re.search(r"^(?:model name|Model|Hardware)\s*:\s*(.+)$", text, re.MULTILINE):
            return found[1].strip()
    return platform.processor() or "unknown"


def busy_cores(seconds: float) -> float:
    """Cores that were not idle, on average over the next `seconds`."""

    def idle() -> float:
        fields = Path("/proc/stat").read_text().split("\n", 1)[0].split()
        return (int(fields[4]) + int(fields[5])) / os.sysconf("SC_CLK_TCK")  # idle and iowait, of all cores

    began, idle_before = time.perf_counter(), idle()
    time.sleep(seconds)
    return max(0.0, (os.cpu_count() or 1) - (idle() - idle_before) / (time.perf_counter() - began))


def _sensed(root: Path) -> dict[str, Any]:
    return {
        "cpu_mhz": [round(int(khz) / 1e3) for khz in _texts(root, f"{CPUFREQ}/scaling_cur_freq")],
        "governors": list(dict.fromkeys(_texts(root, f"{CPUFREQ}/scaling_governor"))),
        "temperature_celsius": _temperatures(root),
        "throttled": throttle_flags(_vcgencmd("get_throttled")),
        "power_watts": _ina3221(root) or pmic_watts(_vcgencmd("pmic_read_adc")),
        "swap_used_bytes": _swap_used(root),
    }


def _temperatures(root: Path) -> dict[str, float]:
    found = {}
    for zone in sorted(root.glob("sys/class/thermal/thermal_zone*")):
        with suppress(OSError, ValueError):  # a zone whose sensor is asleep
            found[(zone / "type").read_text().strip()] = int((zone / "temp").read_text()) / 1e3
    return found


def throttle_flags(answer: str) -> list[str]:
    """What `throttled=0x50005` says, in words."""
    found = re.match(r"throttled=0x([0-9a-fA-F]+)", answer)
    if found is None:
        return []
    bits = int(found[1], 16)
    now = [text for bit, text in THROTTLED.items() if bits >> bit & 1]
    before = [f"{text} since the start" for bit, text in THROTTLED.items() if bits >> (bit + SINCE_START) & 1]
    return now + before


def pmic_watts(answer: str) -> float | None:
    """The sum over a Raspberry Pi 5's rails of volts times amperes; what hangs on its USB sockets is not in it."""
    amperes = dict(re.findall(r"(\w+)_A current\(\d+\)=([\d.]+)A", answer))
    volts = dict(re.findall(r"(\w+)_V volt\(\d+\)=([\d.]+)V", answer))
    rails = amperes.keys() & volts.keys()
    return round(sum(float(amperes[rail]) * float(volts[rail]) for rail in rails), 3) if rails else None


def _ina3221(root: Path) -> float | None:
    """The whole board's rail, the first channel that says so, in watts."""
    for label in sorted(root.glob("sys/bus/i2c/drivers/ina3221/*/hwmon/hwmon*/in*_label")):
        with suppress(OSError, ValueError):
            if label.read_text().strip() in WHOLE_BOARD:
                channel = label.name.removeprefix("in").removesuffix("_label")
                millivolts = int((label.parent / f"in{channel}_input").read_text())
                return round(millivolts * int((label.parent / f"curr{channel}_input").read_text()) / 1e6, 3)
    return None


def _swap_used(root: Path) -> int:
    with suppress(OSError, ValueError, KeyError):
        fields = dict(line.split(":") for line in (root / "proc/meminfo").read_text().splitlines())
        return 1024 * (int(fields["SwapTotal"].split()[0]) - int(fields["SwapFree"].split()[0]))
    return 0


def _vcgencmd(*words: str) -> str:
    with suppress(OSError, subprocess.SubprocessError):
        return subprocess.run(["vcgencmd", *words], capture_output=True, text=True, timeout=5, check=True).stdout
    return ""


def _texts(root: Path, pattern: str) -> list[str]:
    found = []
    for path in sorted(root.glob(pattern)):
        with suppress(OSError):
            found.append(path.read_text().strip())
    return found


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
