"""Run by pytest inside the emulated machine, with the faults: an exchange that importing torch is paid for already."""

import exchange


def test_exchange():
    """Over one NIC by its name: left to choose, each rank takes its part of the two."""
    assert exchange.run_here("verbs:rxe0", num_ranks=4, ranks_per_node=2) == 0
