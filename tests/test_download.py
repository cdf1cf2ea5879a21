"""Downloads against a server on the loopback interface: whole and in place, or nothing at all."""

from __future__ import annotations

import gzip
import http.server
import io
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import threading
import time
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import gdown
import pytest
import zstandard

from flexeval.benchmark.supply.download import download, remote_size
from flexeval.errors import DataError


def zipped(*names: str) -> bytes:
    raw = io.BytesIO()
    with zipfile.ZipFile(raw, "w") as packed:
        for name in names:
            packed.writestr(name, "1")
    return raw.getvalue()


def tarred(member: tarfile.TarInfo) -> bytes:
    raw = io.BytesIO()
    with tarfile.open(fileobj=raw, mode="w") as tar:
        tar.addfile(member)
    return raw.getvalue()


def link() -> tarfile.TarInfo:
    member = tarfile.TarInfo("a")
    member.type, member.linkname = tarfile.SYMTYPE, "/etc/passwd"
    return member


FILES = {
    "/plain.jsonl": b"text",
    "/lines.gz": gzip.compress(b"text"),
    "/lines.zst": zstandard.compress(b"text"),
    "/half.gz": gzip.compress(os.urandom(1000))[:500],
    "/half.zst": zstandard.compress(os.urandom(1000))[:500],
    "/one.zip": zipped("repo-master/a", "repo-master/b/c"),
    "/two.zip": zipped("a", "b/c"),
    "/none.zip": zipped(),
    "/half.zip": zipped("a", "b")[:40],
    "/evil.zip": zipped("../../evil"),
    "/link.tar": tarred(link()),
}


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        if self.path == "/page":
            self._answer(b"<html>Please sign in</html>", kind="text/html; charset=utf-8")
        elif self.path == "/cut.jsonl":
            self._answer(b"te", length=4)
        elif self.path == "/endless":
            self.send_response(200)
            self.end_headers()
            while True:
                self.wfile.write(bytes(2**16))
                time.sleep(0.01)
        elif self.path in FILES:
            self._answer(FILES[self.path])
        else:
            self.send_error(404)

    def do_HEAD(self) -> None:
        self.send_response(200 if self.path in FILES else 404)
        if self.path in FILES:
            self.send_header("Content-Length", str(len(FILES[self.path])))
        self.end_headers()

    def _answer(self, content: bytes, *, kind: str = "application/octet-stream", length: int | None = None) -> None:
        self.send_response(200)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(length or len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"):
        monkeypatch.delenv(name, raising=False)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.daemon_threads = True
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def files(folder: Path) -> dict[str, bytes]:
    found = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file()}
    return {name: path.read_bytes() for name, path in found.items() if not name.endswith(".lock")}


@pytest.mark.parametrize(
    ("path", "target", "comes"),
    [
        ("/plain.jsonl", "there", {"there": b"text"}),
        ("/lines.gz", "there", {"there": b"text"}),
        ("/lines.zst", "there.jsonl", {"there.jsonl": b"text"}),
        ("/lines.gz", "there.gz", {"there.gz": FILES["/lines.gz"]}),
    ],
)
def test_a_file(path: str, target: str, comes: dict[str, bytes], server: str, tmp_path: Path) -> None:
    download(server + path, tmp_path / "data" / target)
    assert files(tmp_path / "data") == comes


def test_an_archive_becomes_what_helm_makes_of_it(server: str, tmp_path: Path) -> None:
    download(f"{server}/one.zip", tmp_path / "one", is_archive=True)
    assert files(tmp_path / "one") == {"a": b"1", "b/c": b"1"}, "the folder that is alone in it"
    download(f"{server}/two.zip", tmp_path / "two", is_archive=True)
    assert files(tmp_path / "two") == {"a": b"1", "b/c": b"1"}
    assert (tmp_path / "two/a").stat().st_mode & 0o777 == 0o644


@pytest.mark.parametrize(
    ("path", "is_archive", "why"),
    [
        ("/absent", False, "HTTPError: HTTP Error 404"),
        ("/page", False, "a web page came in the place of the file"),
        ("/cut.jsonl", False, "cut off: 2 of 4 bytes came"),
        ("/half.gz", False, "the archive is refused: it cannot be read"),
        ("/half.zst", False, "the archive is refused: it cannot be read"),
        ("/half.zip", True, "the archive is refused: it cannot be read"),
        ("/plain.jsonl", True, "the archive is refused: it cannot be read"),
        ("/none.zip", True, "the archive is empty"),
        ("/evil.zip", True, "wants to write to '../../evil'"),
        ("/link.tar", True, "'a' is no plain file"),
    ],
)
def test_what_is_not_whole_leaves_nothing(path: str, is_archive: bool, why: str, server: str, tmp_path: Path) -> None:
    with pytest.raises(DataError) as caught:
        download(server + path, tmp_path / "data/there", is_archive=is_archive)
    assert caught.value.what.startswith(server + path) and why in caught.value.what
    assert caught.value.where == str(tmp_path / "data/there")
    assert not files(tmp_path)
    assert [found.name for found in (tmp_path / "data").iterdir()] == ["there.lock"]


def test_nobody_answers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("no_proxy", "*")
    with pytest.raises(DataError, match="Connection refused"):
        download("http://127.0.0.1:9/file", tmp_path / "there")


def test_what_is_there_stays(server: str, tmp_path: Path) -> None:
    (tmp_path / "there").write_text("mine")
    download(f"{server}/plain.jsonl", tmp_path / "there")
    assert (tmp_path / "there").read_text() == "mine"


@pytest.mark.parametrize("signal_", [signal.SIGINT, signal.SIGKILL])
def test_one_that_is_interrupted_is_not_there_and_the_next_cleans_up(
    signal_: signal.Signals, server: str, tmp_path: Path
) -> None:
    program = "import signal, sys; from pathlib import Path; from flexeval.benchmark.supply.download import download; "
    program += "signal.signal(signal.SIGINT, signal.default_int_handler); "  # which a shell's background jobs ignore
    program += "download(sys.argv[1], Path(sys.argv[2]))"
    child = subprocess.Popen(
        [sys.executable, "-c", program, f"{server}/endless", str(tmp_path / "there")], stderr=subprocess.DEVNULL
    )
    while not any(size for size in (len(content) for content in files(tmp_path).values())):
        assert child.poll() is None
        time.sleep(0.05)
    child.send_signal(signal_)
    child.wait(20)
    assert not (tmp_path / "there").exists()
    download(f"{server}/plain.jsonl", tmp_path / "there")
    assert files(tmp_path) == {"there": b"text"}


def test_google_drive_by_gdown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    url = "https://drive.google.com/uc?export=download&id=1&confirm=t"
    (tmp_path / "one.zip").write_bytes(FILES["/one.zip"])

    def bring(given: str, output: str, quiet: bool) -> str:
        assert given == url and quiet
        return str(shutil.copy(tmp_path / "one.zip", output))

    def refuse(*_: object, **__: object) -> None:
        raise gdown.exceptions.FileURLRetrievalError("Too many users\nhave viewed it")

    monkeypatch.setattr(gdown, "download", refuse)
    with pytest.raises(DataError, match="FileURLRetrievalError: Too many users "):
        download(url, tmp_path / "there", is_archive=True)
    assert not (tmp_path / "there").exists()
    monkeypatch.setattr(gdown, "download", bring)
    download(url, tmp_path / "there", is_archive=True)
    assert files(tmp_path / "there") == {"a": b"1", "b/c": b"1"}
    assert remote_size(url) is None


def test_gdown_takes_what_it_is_given() -> None:
    """The call of the test above, bound to the real function."""
    import inspect

    check: Callable[..., object] = inspect.signature(gdown.download).bind
    check("url", "output", quiet=True)


def test_sizes(server: str) -> None:
    assert remote_size(f"{server}/plain.jsonl") == 4
    assert remote_size(f"{server}/absent") is None
