"""What DeepEP asks of a machine, answered for this package."""

from typing import Any


def check_nvlink_connections(group: Any) -> None:
    """Returns: nothing is required of links between GPUs here. DeepEP raises where PCIe GPUs lack NVLink."""
