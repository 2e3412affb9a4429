"""The whole ep suite runs twice: over the plain transport, and over one that delays, splits and reorders everything."""

import pytest
from through import OF_KERNELS


@pytest.fixture(autouse=True, params=["plain", "chaos"])
def network(request, monkeypatch):
    """chaos: csrc/backends/chaos.cpp from a seed, messages cut into writes of 256 bytes, epochs about to wrap."""
    if request.param == "chaos":
        if request.node.get_closest_marker("plain"):
            raise AssertionError("collected although marked plain")
        monkeypatch.setenv("MOE_COMM_CHAOS_SEED", "11")
        monkeypatch.setenv("MOE_COMM_SHARD_BYTES", "256")
        monkeypatch.setenv(
            "MOE_COMM_FIRST_EPOCH", str(2**32 - 4)
        )  # also the wrap of the 6 bits that travel
    return request.param


def pytest_collection_modifyitems(config, items):
    """Drop what would only be skipped, so that a skip in the report always means something."""
    through = config.getoption("--through")

    def is_run(item):
        params = getattr(item, "callspec", _none).params.values()
        if through and ("chaos" in params or item.get_closest_marker("host")):
            return False
        if through in OF_KERNELS and item.get_closest_marker("loops"):
            return False
        if through == "rounds" and item.get_closest_marker("one_round"):
            return False
        return not ("chaos" in params and item.get_closest_marker("plain"))

    items[:] = filter(is_run, items)


class _none:
    params: dict = {}
