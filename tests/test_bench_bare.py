"""`flexeval bench` where there is a GPU and little else: no HELM, no network, nothing that only suites need."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from tiny_models import tiny_config

ROOT = Path(__file__).parent.parent
OF_SUITES = ("helm", "datasets", "plotly", "gguf", "nltk", "pyhocon")
"""What only questions, other people's files and reports need."""
ABSENT = (*OF_SUITES, "pandas", "scipy", "jinja2", "PIL", "accelerate")
SITE = """
import sys
from importlib.machinery import PathFinder

class Without:
    def __init__(self, finder):
        self.finder = finder
    def __getattr__(self, name):
        return getattr(self.finder, name)
    def find_spec(self, name, *where):
        return None if name.partition(".")[0] in ABSENT else self.finder.find_spec(name, *where)

sys.meta_path[:] = [Without(finder) if finder is PathFinder else finder for finder in sys.meta_path]
"""
"""Python runs `sitecustomize` in every process, those that the benchmark starts included."""


def run_bare(folder: Path, absent: tuple[str, ...], *command: object) -> subprocess.CompletedProcess[str]:
    """Run Python without these packages, an index, or anything in the cache."""
    (folder / "site").mkdir()
    (folder / "site/sitecustomize.py").write_text(f"ABSENT = {absent!r}\n{SITE}")
    environment = os.environ | {
        "PYTHONPATH": f"{folder / 'site'}{os.pathsep}{ROOT}",
        "FLEXEVAL_CACHE": str(folder / "cache"),
        "PIP_INDEX_URL": "http://127.0.0.1:9",
        "HF_HUB_OFFLINE": "1",
    }
    words = [sys.executable, "-m", *map(str, command)]
    return subprocess.run(words, cwd=folder, env=environment, capture_output=True, text=True, check=False)


def test_made_up_tokens_need_no_helm_no_network_and_no_tokenizer(tmp_path: Path) -> None:
    tiny_config("opt", vocab_size=50272).save_pretrained(tmp_path / "tiny")
    work = (
        "--model",
        f"dummy:{tmp_path / 'tiny'}",
        "--prompt-len",
        64,
        "--gen-len",
        4,
        "--num-requests",
        4,
        "--warm-up",
        0,
        "--dtype",
        "float32",  # in 16 bits, answers are the same up to rounding
    )
    done = run_bare(tmp_path, ABSENT, "flexeval", "bench", *work, "--peer", "transformers", "--out", "figures.json")
    assert done.returncode == 0, done.stderr
    ours, peer = json.loads((tmp_path / "figures.json").read_text())["systems"]
    assert (ours["system"], peer["system"], peer["same_answers"]) == ("flexeval", "transformers", 1.0)
    assert {path.name for path in (tmp_path / "cache").iterdir()} == {"dummies", "families", "kernels"}, (
        "no tokenizer was fetched"
    )


def test_a_peer_that_is_not_installed_is_named_before_anything_runs(tmp_path: Path) -> None:
    done = run_bare(tmp_path, ABSENT, "flexeval", "bench", "--model", "dummy:opt-125m", "--peer", "accelerate")
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert line == "flexeval: error[config]: the peer accelerate is not installed (--peer). Run pip install accelerate"


def test_what_is_tested_on_a_gpu_needs_no_helm(tmp_path: Path) -> None:
    files = [path for path in sorted(ROOT.glob("tests/test_*.py")) if "pytest.mark.gpu" in path.read_text()]
    done = run_bare(tmp_path, OF_SUITES, "pytest", "-q", "--collect-only", "-m", "gpu", *files)
    assert done.returncode == 0, done.stdout
