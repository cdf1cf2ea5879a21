"""HELM's downloads, by our own code: whole or not at all. Knows HELM's function; must not know who calls it.

HELM's own unpacks a file in its final place, needs a Python whose archives have filters (3.11.4), and calls `gdown` as
a program, which is not on the path of an environment that is not activated.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import helm.common.general

from flexeval.benchmark.helm.replacing import replaced
from flexeval.benchmark.supply.download import download


def ensure_file_downloaded(
    source_url: str,
    target_path: str,
    unpack: bool = False,
    downloader_executable: str | None = None,
    unpack_type: str | None = None,
) -> None:
    """Do what `helm.common.general.ensure_file_downloaded` does. Raises `DataError`.

    Which program downloads, and which sort of archive it is, shows in the address and in the file.
    """
    download(source_url, Path(target_path), is_archive=unpack)


@contextmanager
def careful_downloads() -> Iterator[None]:
    """Have every scenario download this way until the block ends."""
    with replaced((helm.common.general.ensure_file_downloaded, ensure_file_downloaded)):
        yield
