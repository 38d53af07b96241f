"""Downloads: checked against the digits of the file's name, kept once, and nothing kept when they fail."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from ksm_edge.bundle.download import fetch
from ksm_edge.errors import DamagedFileError, KsmEdgeError
from ksm_edge.resources import cache_folder

CONTENT = bytes(range(256)) * 9000  # more than one block
DIGITS = hashlib.sha256(CONTENT).hexdigest()[:8]


class Quiet(SimpleHTTPRequestHandler):
    asked: list[str] = []  # noqa: RUF012 - one server, one list

    def do_GET(self) -> None:
        self.asked.append(self.path)
        super().do_GET()

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def server(tmp_path: Path) -> Iterator[str]:
    (tmp_path / "served").mkdir()
    (tmp_path / "served" / f"net-{DIGITS}.pth").write_bytes(CONTENT)
    (tmp_path / "served" / "net-00000000.pth").write_bytes(CONTENT)
    Quiet.asked.clear()
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=tmp_path / "served")) as http:
        thread = threading.Thread(target=http.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield f"http://127.0.0.1:{http.server_address[1]}"
        http.shutdown()
        thread.join()


def test_a_file_is_fetched_once_and_then_taken_from_the_cache(server: str, tmp_path: Path) -> None:
    url = f"{server}/net-{DIGITS}.pth"
    path = fetch(url, DIGITS, tmp_path / "cache")
    assert path.read_bytes() == CONTENT
    assert fetch(url, DIGITS, tmp_path / "cache") == path
    assert len(Quiet.asked) == 1


def test_a_damaged_copy_in_the_cache_is_fetched_again(server: str, tmp_path: Path) -> None:
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / f"net-{DIGITS}.pth").write_bytes(CONTENT[:-1])
    assert fetch(f"{server}/net-{DIGITS}.pth", DIGITS, tmp_path / "cache").read_bytes() == CONTENT


def test_another_file_than_was_meant_is_refused_and_not_kept(server: str, tmp_path: Path) -> None:
    with pytest.raises(DamagedFileError, match=f"sha256 of what came is {DIGITS}.*it should begin with 00000000"):
        fetch(f"{server}/net-00000000.pth", "00000000", tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []


def test_an_absent_file_is_named_with_the_reason(server: str, tmp_path: Path) -> None:
    with pytest.raises(KsmEdgeError, match=r"could not download .*/none\.pth \(.*not found.*\).*--weights FILE"):
        fetch(f"{server}/none.pth", "", tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []


def test_without_a_network_the_error_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(KsmEdgeError, match=r"refused.*without a network, fetch it elsewhere .*--weights FILE"):
        fetch("http://127.0.0.1:9/net.pth", "", tmp_path / "cache")


def test_the_cache_is_where_the_user_says(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("KSM_EDGE_CACHE", raising=False)
    assert cache_folder() == tmp_path / "ksm_edge"
    monkeypatch.setenv("KSM_EDGE_CACHE", str(tmp_path / "own"))
    assert cache_folder() == tmp_path / "own"
