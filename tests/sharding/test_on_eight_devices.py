"""Runs `eight_devices*.py` where there are eight devices: a CPU's, in a process of their own."""

import os
import subprocess
import sys

from tests.import_graph import ROOT
from tests.sharding import eight_devices, eight_devices_bits, eight_devices_data


def test_on_eight_devices(request):
    flags = "--xla_force_host_platform_device_count=8"
    environment = {
        **os.environ,
        "XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} {flags}".strip(),
        "JAX_PLATFORMS": "cpu",
    }
    environment.pop("PYTEST_XDIST_WORKER", None)
    tier = ["--tier", request.config.getoption("tier")]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-n", "0", *tier]
    command += [each.__file__ for each in (eight_devices, eight_devices_bits, eight_devices_data)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=1200)
    assert done.returncode == 0, done.stdout[-20_000:] + done.stderr[-2_000:]
