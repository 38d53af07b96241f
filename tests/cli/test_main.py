"""The registry of verbs, the one place where errors become exit codes, and the options that verbs share."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from types import ModuleType

import pytest

import ksm_edge
from ksm_edge import errors
from ksm_edge.cli.arguments import byte_size, positive
from ksm_edge.cli.main import VERBS, build_parser, main

EXIT_CODES = {
    "KsmEdgeError": 1,
    "UsageError": 2,
    "DataError": 2,
    "KeyFileError": 2,
    "FileError": 3,
    "DamagedFileError": 3,
    "WrongBackboneError": 3,
    "UnsupportedVersionError": 3,
    "SignatureError": 3,
    "UnsignedError": 3,
    "UnsupportedError": 4,
    "BudgetError": 5,
}


def failing(monkeypatch: pytest.MonkeyPatch, error: BaseException) -> None:
    """A verb `devices` that ends in `error`."""

    def run(args: argparse.Namespace) -> int:
        raise error

    module = ModuleType("failing")
    module.HELP, module.run = "fails", run  # type: ignore[attr-defined]
    module.add_arguments = lambda parser: None  # type: ignore[attr-defined]
    monkeypatch.setitem(VERBS, "devices", module)


def test_every_error_class_has_its_exit_code() -> None:
    classes = {
        name: c for name, c in vars(errors).items() if isinstance(c, type) and issubclass(c, errors.KsmEdgeError)
    }
    assert {name: c.exit_code for name, c in classes.items()} == EXIT_CODES


@pytest.mark.parametrize("name", EXIT_CODES)
def test_an_error_becomes_one_sentence_on_stderr_and_its_exit_code(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    failing(monkeypatch, getattr(errors, name)("what was given, what to do"))
    assert main(["devices"]) == EXIT_CODES[name]
    out, err = capsys.readouterr()
    assert (out, err) == ("", "ksm-edge devices: what was given, what to do\n")


def test_ctrl_c_is_130(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    failing(monkeypatch, KeyboardInterrupt())
    assert main(["devices"]) == 130
    assert "interrupted" in capsys.readouterr().err


def test_the_systems_errors_name_the_file(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    failing(monkeypatch, PermissionError(13, "Permission denied", "/a/file"))
    assert main(["devices"]) == 1
    assert capsys.readouterr().err == "ksm-edge devices: /a/file: Permission denied\n"


def test_a_fault_of_our_own_is_not_swallowed(monkeypatch: pytest.MonkeyPatch) -> None:
    failing(monkeypatch, ZeroDivisionError("a bug"))
    with pytest.raises(ZeroDivisionError):
        main(["devices"])


@pytest.mark.parametrize("arguments", [[], ["fly"], ["adapt", "--epochs", "0"], ["adapt", "--memory-budget", "much"]])
def test_a_call_that_is_off_is_2(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2
    assert "usage: ksm-edge" in capsys.readouterr().err


def test_the_version_is_the_packages(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["--version"])
    assert caught.value.code == 0
    assert capsys.readouterr().out == f"ksm-edge {ksm_edge.__version__}\n"


def test_help_lists_every_verb_with_what_it_does(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--help"])
    out = " ".join(capsys.readouterr().out.split())
    for name, module in VERBS.items():
        assert f"{name} {module.HELP}" in out


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_has_the_same_face(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    module = VERBS[verb]
    assert module.HELP[0].islower()
    assert not module.HELP.endswith(".")
    with pytest.raises(SystemExit) as caught:
        build_parser().parse_args([verb, "--help"])
    assert caught.value.code == 0
    assert "--json" in capsys.readouterr().out


HEAVY = ("torch", "torchvision", "onnxruntime", "onnx", "numpy", "PIL", "safetensors", "sklearn", "psutil", "tqdm")
HEAVY += ("cryptography",)
LOADED = """
import json, sys
{statement}
print(json.dumps(sorted(name for name in {heavy!r} if name in sys.modules)), file=sys.stderr)
"""
LIGHT = {
    "import ksm_edge": "import ksm_edge",
    "--help": "from ksm_edge.cli.main import main\ntry: main(['--help'])\nexcept SystemExit: pass",
    "adapt --help": "from ksm_edge.cli.main import main\ntry: main(['adapt', '--help'])\nexcept SystemExit: pass",
}


def loaded_by(statement: str) -> list[str]:
    code = LOADED.format(statement=statement, heavy=HEAVY)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return json.loads(done.stderr)


@pytest.mark.parametrize("statement", LIGHT.values(), ids=LIGHT)
def test_help_loads_nothing_heavy(statement: str) -> None:
    assert loaded_by(statement) == []


def test_that_check_can_fail() -> None:
    assert loaded_by("import numpy, ksm_edge") == ["numpy"]


def test_a_closed_pipe_is_no_traceback() -> None:
    """As in `ksm-edge devices | head -0`."""
    code = "import sys; sys.argv = ['ksm-edge', 'devices']; from ksm_edge.cli.main import entry; entry()"
    child = subprocess.Popen(
        [sys.executable, "-u", "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert child.stdout is not None
    assert child.stderr is not None
    child.stdout.close()
    said = child.stderr.read()
    child.stderr.close()
    assert child.wait(60) == 1
    assert "Traceback" not in said


SIZES = {
    "1024": 1024,
    "256MiB": 2**28,
    "256 mib": 2**28,
    "1GB": 10**9,
    "1.5GiB": 3 * 2**29,
    "10kB": 10**4,
    "2KiB": 2**11,
}


@pytest.mark.parametrize(("text", "size"), SIZES.items())
def test_sizes_are_read_with_their_units(text: str, size: int) -> None:
    assert byte_size(text) == size


@pytest.mark.parametrize("text", ["", "MiB", "-5MiB", "5 apples", "1e3", "5M", "1,5GB"])
def test_what_is_no_size_is_answered_with_an_example(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match="write it like 256MiB or 1GB"):
        byte_size(text)


def test_positive_numbers_are_whole_and_at_least_1() -> None:
    assert positive("7") == 7
    with pytest.raises(argparse.ArgumentTypeError, match="at least 1"):
        positive("0")
    with pytest.raises(ValueError, match="invalid literal"):
        positive("1.5")
