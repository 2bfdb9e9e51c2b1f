"""What a device or a machine has: control groups, and what a GPU says."""

import os

import jax
import psutil
import pytest

from gptjax.errors import RequestError
from gptjax.support import runtime
from gptjax.support.runtime import DeviceMemory, cgroup_memory


def _write(root, files: dict[str, str]) -> None:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


V1 = "sys/fs/cgroup/memory"
V2 = "sys/fs/cgroup"


@pytest.mark.parametrize(
    ("files", "found"),
    [
        ({}, []),
        ({"proc/self/cgroup": "nonsense\n\n::\n"}, []),
        (  # version 2: the group itself has no limit, the one above it has; cached files are not lost to us
            {
                "proc/self/cgroup": "0::/user/job\n",
                f"{V2}/user/job/memory.max": "max\n",
                f"{V2}/user/job/memory.current": "5000\n",
                f"{V2}/user/memory.max": "10000\n",
                f"{V2}/user/memory.current": "7000\n",
                f"{V2}/user/memory.stat": "anon 4000\ninactive_file 300\nactive_file 200\n",
            },
            [(10000, 3500)],
        ),
        (  # both limited; the caller takes the least
            {
                "proc/self/cgroup": "0::/a/b\n",
                f"{V2}/a/b/memory.max": "500",
                f"{V2}/a/b/memory.current": "600",
                f"{V2}/a/memory.max": "1000",
                f"{V2}/a/memory.current": "600",
            },
            [(500, 0), (1000, 400)],
        ),
        (  # version 1 in a container: the path is the host's, and not to be seen
            {
                "proc/self/cgroup": "5:cpu,cpuacct:/x\n4:memory:/docker/1a2b\n0::/\n",
                f"{V1}/memory.limit_in_bytes": "8000",
                f"{V1}/memory.usage_in_bytes": "7000",
                f"{V1}/memory.stat": "inactive_file 1\ntotal_inactive_file 500\ntotal_active_file 50\n",
            },
            [(8000, 1550)],
        ),
        (  # version 1 without a limit
            {
                "proc/self/cgroup": "4:memory:/\n",
                f"{V1}/memory.limit_in_bytes": "9223372036854771712",
                f"{V1}/memory.usage_in_bytes": "7000",
            },
            [],
        ),
        (  # version 2 beside version 1
            {
                "proc/self/cgroup": "4:memory:/m\n0::/u\n",
                f"{V1}/m/memory.limit_in_bytes": "900",
                f"{V1}/m/memory.usage_in_bytes": "100",
                f"{V2}/unified/u/memory.max": "700",
                f"{V2}/unified/u/memory.current": "100",
            },
            [(900, 800), (700, 600)],
        ),
    ],
)
def test_control_groups(tmp_path, files, found):
    _write(tmp_path, files)
    assert cgroup_memory(tmp_path) == found


def test_the_least_of_machine_and_groups_counts(monkeypatch):
    class Cpu:
        device_kind, platform = "cpu", "cpu"

        def memory_stats(self):
            return None

    system = psutil.virtual_memory()
    monkeypatch.setattr(runtime, "cgroup_memory", list)
    assert runtime.device_memory(Cpu()).limit == system.total
    monkeypatch.setattr(runtime, "cgroup_memory", lambda: [(5000, 40), (4000, 900)])
    assert runtime.device_memory(Cpu()) == DeviceMemory("cpu", "cpu", 4000, 3960, 40)


def test_a_gpu_tells_for_itself():
    class Gpu:
        device_kind, platform = "NVIDIA H200", "gpu"

        def memory_stats(self):
            return {"bytes_limit": 1000, "bytes_in_use": 300, "peak_bytes_in_use": 600}

    assert runtime.device_memory(Gpu()) == DeviceMemory("NVIDIA H200", "gpu", 1000, 300, 700)


@pytest.fixture
def environment(monkeypatch):
    for name in ("XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_MEM_FRACTION"):
        monkeypatch.setenv(name, "")  # so that it is as before afterwards
        monkeypatch.delenv(name)
    return monkeypatch


def test_jax_is_given_a_larger_share_before_it_starts(environment):
    environment.setattr("jax._src.xla_bridge.backends_are_initialized", lambda: False)
    runtime.reserve(0.5)
    assert "XLA_PYTHON_CLIENT_MEM_FRACTION" not in os.environ  # JAX's 0.75 is more
    runtime.reserve(0.9)
    assert os.environ["XLA_PYTHON_CLIENT_MEM_FRACTION"] == "0.9" and runtime.fraction() == 0.9
    runtime.reserve(0.8)
    assert runtime.fraction() == 0.9
    assert runtime.whole_memory(DeviceMemory("NVIDIA H200", "gpu", 900, 0, 900)) == 1000
    assert runtime.whole_memory(DeviceMemory("cpu", "cpu", 900, 0, 900)) == 900


def test_a_share_that_jax_will_not_take_is_refused(environment):
    environment.setattr(jax, "default_backend", lambda: "gpu")
    environment.setattr("jax._src.xla_bridge.backends_are_initialized", lambda: True)
    with pytest.raises(RequestError, match=r"JAX has started and taken 0\.75"):
        runtime.reserve(0.9)
    environment.setattr(jax, "default_backend", lambda: "cpu")
    runtime.reserve(0.9)  # there is nothing to take
    environment.setenv("XLA_CLIENT_MEM_FRACTION", "0.4")
    with pytest.raises(RequestError, match=r"\$XLA_CLIENT_MEM_FRACTION gives JAX only 0.4 .* set it to 0.9"):
        runtime.reserve(0.9)
    runtime.reserve(0.4)
