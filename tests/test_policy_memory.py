"""Free host memory obeys cgroups of both versions, and the limits of parents."""

from types import SimpleNamespace

import psutil
import pytest

from flexeval.policy.memory import free_host_bytes

GIB = 2**30


@pytest.fixture(autouse=True)
def machine_with_64_gib(monkeypatch):
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=64 * GIB))


def write(root, files):
    for path, text in files.items():
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_text(f"{text}\n")


def v1(path, limit, usage, inactive=0):
    folder = f"sys/fs/cgroup/memory{path}"
    return {
        f"{folder}/memory.limit_in_bytes": limit,
        f"{folder}/memory.usage_in_bytes": usage,
        f"{folder}/memory.stat": f"cache 5\ninactive_file 7\ntotal_inactive_file {inactive}",
    }


def v2(path, limit, usage, inactive=0):
    folder = f"sys/fs/cgroup{path}"
    return {
        f"{folder}/memory.max": limit,
        f"{folder}/memory.current": usage,
        f"{folder}/memory.stat": f"anon 5\ninactive_file {inactive}",
    }


V1_MEMBER = {"proc/self/cgroup": "5:cpu,cpuacct:/\n4:memory:/jobs/one\n0::/"}
V2_MEMBER = {"proc/self/cgroup": "0::/jobs/one"}


@pytest.mark.parametrize(
    ("files", "free_gib"),
    [
        pytest.param({}, 64, id="no cgroups"),
        pytest.param(V2_MEMBER | v2("/jobs/one", "max", 5 * GIB), 64, id="v2 unlimited"),
        pytest.param(V2_MEMBER | v2("/jobs/one", 16 * GIB, 5 * GIB), 11, id="v2"),
        pytest.param(V2_MEMBER | v2("/jobs/one", 16 * GIB, 5 * GIB, 2 * GIB), 13, id="v2 reclaimable cache"),
        pytest.param(V2_MEMBER | v2("/jobs/one", 16 * GIB, 5 * GIB) | v2("/jobs", 8 * GIB, 6 * GIB), 2, id="v2 parent"),
        pytest.param(V2_MEMBER | v2("/jobs/one", 100 * GIB, 0), 64, id="v2 limit above the machine"),
        pytest.param(V2_MEMBER | v2("/jobs/one", 4 * GIB, 5 * GIB), 0, id="v2 overdrawn"),
        pytest.param({"proc/self/cgroup": "0::/seen/by/host"} | v2("", 9 * GIB, GIB), 8, id="v2 container's own mount"),
        pytest.param(V1_MEMBER | v1("/jobs/one", 2**63 - 4096, GIB), 64, id="v1 unlimited"),
        pytest.param(V1_MEMBER | v1("/jobs/one", 16 * GIB, 5 * GIB, 3 * GIB), 14, id="v1 reclaimable cache"),
        pytest.param(V1_MEMBER | v1("/jobs/one", 16 * GIB, 0) | v1("", 8 * GIB, 6 * GIB), 2, id="v1 parent"),
        pytest.param(V1_MEMBER | v2("", 8 * GIB, 6 * GIB), 2, id="v1 and v2 together"),
    ],
)
def test_free_host_bytes(tmp_path, files, free_gib):
    write(tmp_path, files)
    assert free_host_bytes(tmp_path) == free_gib * GIB


def test_this_machine():
    assert 0 < free_host_bytes() <= 64 * GIB
