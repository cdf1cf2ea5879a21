"""Downloads that give up soon, against hosts of our own on the loopback interface."""

import http.server
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from urllib.error import HTTPError, URLError
from urllib.request import urlopen, urlretrieve

import datasets
import pytest
from huggingface_hub import constants

from flexeval.benchmark import network
from flexeval.benchmark.network import impatient_downloads


class Answers(http.server.BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.send_response(404 if self.path == "/missing" else 200)
        self.end_headers()
        self.wfile.write(b"data")

    do_HEAD = do_GET

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def server() -> Iterator[str]:
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Answers) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.fixture(autouse=True)
def unprobed(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No proxy, the hub not known to be there or not; whatever a test finds out is forgotten."""
    for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    network._hub_is_reachable.cache_clear()
    yield
    network._hub_is_reachable.cache_clear()


def closed_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def test_a_host_that_could_not_be_reached_is_not_asked_again(
    server: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", server)
    dead = f"http://127.0.0.1:{closed_port()}"
    with impatient_downloads():
        with pytest.raises(URLError, match="refused"):
            urlopen(f"{dead}/one")
        with pytest.raises(URLError, match="could not be reached before"):
            urlretrieve(f"{dead}/two", tmp_path / "two")
        urlretrieve(f"{server}/data", tmp_path / "data")
    assert (tmp_path / "data").read_text() == "data"
    with pytest.raises(URLError, match="refused"):
        urlopen(f"{dead}/three")


def test_a_host_that_lacks_one_file_is_asked_for_others(server: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", server)
    with impatient_downloads():
        with pytest.raises(HTTPError, match="404"):
            urlopen(f"{server}/missing")
        assert urlopen(f"{server}/data").read() == b"data"


def test_the_hub_is_offline_only_where_it_cannot_be_reached(server: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", f"{server}/missing")
    with impatient_downloads():
        assert not constants.HF_HUB_OFFLINE, "an error is an answer"
    network._hub_is_reachable.cache_clear()
    monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{closed_port()}")
    with impatient_downloads():
        assert constants.HF_HUB_OFFLINE and datasets.config.HF_HUB_OFFLINE
    assert not constants.HF_HUB_OFFLINE and not datasets.config.HF_HUB_OFFLINE


def test_nobody_waits_for_ever(server: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", server)
    assert socket.getdefaulttimeout() is None
    with impatient_downloads():
        assert socket.getdefaulttimeout() == 20
    assert socket.getdefaulttimeout() is None
