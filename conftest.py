"""Settings every test runs under: the CPU unless asked otherwise, and no silent rank promotion."""

from pathlib import Path

import jax
import pytest

# Linux lets a process map 65,530 regions, of which every compiled program takes some; beyond it,
# compiling ends the process.
_MOST_REGIONS = 30_000


def pytest_addoption(parser):
    parser.addoption(
        "--platform",
        default="cpu",
        help="JAX platform to run on: cpu (default), cuda, tpu; tests marked gpu need another one",
    )


def pytest_configure(config):
    platform = config.getoption("--platform")
    jax.config.update("jax_platforms", platform)
    jax.config.update("jax_numpy_rank_promotion", "raise")
    if platform == "cpu":
        # Sharding is tested on one machine: its CPU counts as four devices.
        jax.config.update("jax_num_cpu_devices", 4)


def pytest_collection_modifyitems(config, items):
    if config.getoption("--platform") != "cpu":
        return
    skip = pytest.mark.skip(reason="needs an accelerator: run with --platform cuda")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(skip)


def pytest_runtest_teardown():
    regions = Path("/proc/self/maps")
    if regions.exists() and len(regions.read_bytes().splitlines()) > _MOST_REGIONS:
        jax.clear_caches()
