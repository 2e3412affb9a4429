"""Whole exchanges made of nothing but Triton's kernels (interpreted), against reference.py, bit for bit."""

import pytest
import simulated_exchange
import test_kernels_exchange as exchange
import torch

from moe_comm.kernels import TRITON


@pytest.fixture(autouse=True)
def triton_steps(monkeypatch):
    monkeypatch.setattr(simulated_exchange, "step", TRITON)


@pytest.mark.parametrize("layout", ["rank", "expert", "padded"])
@pytest.mark.parametrize("nodes, hops", [("2 x 2 interleaved", "node"), ("2 x 2", "rank")])
def test_round_trip(nodes, hops, layout):
    more = {"rank": {}, "expert": {"alignment": 4}, "padded": {"capacity": 30}}[layout]
    inputs = exchange.make_inputs([5, 0, 7, 2], layout=layout, **more)
    assert exchange.round_trip(exchange.NODES[nodes], hops, inputs, capacity=4)[0] == 2


def test_scales_and_float32():
    inputs = exchange.make_inputs(
        [4, 5, 0, 3], dtype=torch.float32, scales=True, topk=4, layout="expert", seed=1
    )
    exchange.round_trip(exchange.NODES["2 x 2"], "node", inputs, capacity=4)
