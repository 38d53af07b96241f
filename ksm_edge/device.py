"""Board profiles: what a board is declared to have, and how much of it a process of ours may use.

A profile is a TOML file in `devices/`, or a user's own with the same fields; every number in it names its source.
"""

from __future__ import annotations

import difflib
import math
import os
import sys
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from ksm_edge.cores import fast_cores
from ksm_edge.errors import UsageError
from ksm_edge.resources import data_folder

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

HOST = "host"
# Written by the kernel of boards that boot with a device tree, which PCs do not.
MODEL_FILE = Path("/proc/device-tree/model")


@dataclass(frozen=True)
class PowerMode:
    """What a board is set to, to stay within some watts."""

    name: str
    watts: float
    cores: int
    clock_mhz: int


@dataclass(frozen=True)
class Device:
    """A board as its profile declares it."""

    name: str
    title: str
    cores: int
    threads: int  # to use
    clock_mhz: int  # 0: unknown
    ram_bytes: int
    free_ram_bytes: int  # what the system leaves
    memory_budget_bytes: int  # of a command, unless the user says otherwise
    batch: int  # images in an optimizer step
    # What predictions are made from; 0 where it is unknown.
    flop_per_cycle: int = 0  # FP32, of one core at its peak; a multiplication and its addition are two
    copy_bytes_per_second: int = 0  # memcpy of large blocks by one thread, every byte counted once
    set_bytes_per_second: int = 0  # memset of the same
    storage_read_bytes_per_second: int = 0
    storage_write_bytes_per_second: int = 0
    idle_watts: float = 0.0  # of the whole board
    in_order: bool = False  # a core that waits for each load before the next operation
    power_modes: tuple[PowerMode, ...] = ()  # the first is the one that `threads` and `clock_mhz` are of
    runtimes: tuple[str, ...] = ()  # that stock wheels bring to its usual system
    aliases: tuple[str, ...] = ()
    model_strings: tuple[str, ...] = ()  # beginnings of the text in MODEL_FILE
    notes: tuple[str, ...] = ()
    sources: Mapping[str, str] = field(default_factory=dict)  # of every number, by field

    @staticmethod
    def load(name_or_path: str | Path) -> Device:
        """The profile of that name, alias or TOML file; raises UsageError for an unknown name or an invalid file.

        >>> Device.load("jetson").name
        'jetson-orin-nano'
        """
        name = str(name_or_path)
        if name.endswith(".toml") or os.sep in name:
            return _read(Path(name))
        known = _profiles()
        for profile in known.values():
            if name == profile["name"] or name in profile.get("aliases", ()):
                return _host() if profile["name"] == HOST else _from_table(profile, profile["name"])
        raise UsageError(_unknown(name, known))

    @property
    def is_emulated(self) -> bool:
        """Whether this profile is of another machine than the one at hand."""
        return self.name != HOST and not self.is_called(machine_model())

    def is_called(self, model: str) -> bool:
        """Whether a machine that calls itself so is this board."""
        return _matches(self.model_strings, model)


NUMBERS = tuple(f.name for f in fields(Device) if f.type == "int" and f.default is MISSING)
_KINDS: dict[str, tuple[str, type]] = {
    "str": ("a text", str),
    "int": ("a whole number", int),
    "float": ("a number", float),
    "bool": ("true or false", bool),
    "Mapping[str, str]": ("a table", dict),
}


def device_names() -> tuple[str, ...]:
    """Names of the built-in profiles, sorted."""
    return tuple(_profiles())


def this_machine() -> Device:
    """The machine at hand: a known board with its memory as it is now, else the host profile filled in."""
    host = _host()
    for profile in _profiles().values():
        if _matches(profile.get("model_strings", ()), machine_model()):
            board = _from_table(profile, profile["name"])
            return replace(board, cores=host.cores, ram_bytes=host.ram_bytes, free_ram_bytes=host.free_ram_bytes)
    return host


def machine_model() -> str:
    """What this board calls itself, such as "Raspberry Pi 4 Model B Rev 1.4"; empty where there is no device tree."""
    try:
        return MODEL_FILE.read_bytes().rstrip(b"\0").decode(errors="replace")
    except OSError:
        return ""


def _matches(model_strings: tuple[str, ...] | list[str], model: str) -> bool:
    # Compared with a blank added, so that "Raspberry Pi 5 " is neither a 500 nor in need of a revision.
    return any(f"{model} ".startswith(beginning) for beginning in model_strings)


def _profiles() -> dict[str, dict[str, Any]]:
    """Tables of the built-in profiles by name, sorted; the files are our own, so nothing is checked."""
    tables = [tomllib.loads(path.read_text()) for path in data_folder("ksm_edge.devices").glob("*.toml")]
    return {table["name"]: table for table in sorted(tables, key=lambda table: str(table["name"]))}


def _unknown(name: str, known: Mapping[str, dict[str, Any]]) -> str:
    every = [word for profile in known.values() for word in (profile["name"], *profile.get("aliases", ()))]
    close = difflib.get_close_matches(name.lower(), every, n=3)
    hint = f"; did you mean {' or '.join(close)}?" if close else "."
    return f"device {name!r} is not known{hint} Known: {', '.join(known)}. Or give the path of a TOML profile."


def _read(path: Path) -> Device:
    """A user's profile, checked."""
    try:
        table = tomllib.loads(path.read_text())
    except FileNotFoundError:
        raise UsageError(f"there is no device profile {path}. Known names: {', '.join(device_names())}") from None
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise UsageError(f"{path} cannot be read as a TOML device profile: {error}") from error
    if table.get("name") == HOST:
        raise UsageError(f"{path}: {HOST!r} is the name of the machine at hand: give the board another one")
    return _from_table(table, str(path))


def _from_table(table: Mapping[str, Any], origin: str) -> Device:
    """The record of a TOML table; raises UsageError that names the field which is unknown, missing or off."""
    values = _checked(Device, table, origin, "a device profile")
    modes = tuple(
        PowerMode(**_checked(PowerMode, mode, origin, "a power mode")) for mode in table.get("power_modes", ())
    )
    return Device(**{**values, "power_modes": modes})


def _checked(record: type, table: Any, origin: str, what: str) -> dict[str, Any]:
    """The table's values, each of its field's type; lists as tuples."""
    kinds = {f.name: f for f in fields(record)}
    if not isinstance(table, Mapping):
        raise UsageError(f"{origin}: {what} is a table, not {table!r}")
    values: dict[str, Any] = {}
    for name, value in table.items():
        if name not in kinds:
            raise UsageError(f"{origin}: {name} is no field of {what}; fields: {', '.join(kinds)}")
        kind, wanted = _KINDS.get(str(kinds[name].type), ("a list", list))
        number = wanted is float and isinstance(value, int)
        if not (isinstance(value, wanted) or number) or isinstance(value, bool) != (wanted is bool):
            raise UsageError(f"{origin}: {name} must be {kind}, not {value!r}")
        if wanted is float and not math.isfinite(value):
            raise UsageError(f"{origin}: {name} must be a finite number, not {value}")
        if wanted is list and kinds[name].type == "tuple[str, ...]" and not all(isinstance(v, str) for v in value):
            raise UsageError(f"{origin}: {name} must be a list of texts, not {value!r}")
        if wanted in (int, float) and value < (1 if name in NUMBERS and name != "clock_mhz" else 0):
            raise UsageError(f"{origin}: {name} must be positive, not {value}")
        values[name] = tuple(value) if wanted is list else value
    missing = [name for name, f in kinds.items() if f.default is MISSING and f.default_factory is MISSING]
    if lacking := [name for name in missing if name not in table]:
        raise UsageError(f"{origin}: {what} needs {', '.join(lacking)} as well")
    return values


def _host() -> Device:
    """The host profile, its missing numbers asked of this machine."""
    import psutil

    memory = psutil.virtual_memory()
    cores = len(os.sched_getaffinity(0))
    measured = {
        "cores": cores,
        "threads": len(fast_cores()),
        "clock_mhz": _clock_mhz(),
        "ram_bytes": memory.total,
        "free_ram_bytes": memory.available,
        "memory_budget_bytes": max(memory.available // 2, 1),
    }
    table = {**measured, **_profiles()[HOST]}
    sources = {**dict.fromkeys(measured, "measured on this machine"), **table["sources"]}
    return _from_table({**table, "sources": sources}, HOST)


def _clock_mhz() -> int:
    import psutil

    frequency = psutil.cpu_freq()  # None in some containers
    return round(frequency.max or frequency.current) if frequency else 0
