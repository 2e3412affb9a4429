"""num_sms: how many blocks the kernels of a call are launched with, at most. Each may get an SM of its own."""

# ruff: noqa: F811  (fixtures)
import sys
from pathlib import Path

import pytest
import torch
from test_kernel_streams import SIZES, cuda, on_threads  # noqa: F401

import moe_comm
from moe_comm import ArgumentError, deep_ep
from moe_comm.kernels import fused

sys.path.append(str(Path(__file__).resolve().parents[1] / "ep"))
from cases import check_dispatched, dispatch, expected, make_case

OF_ROWS = ("moe_comm_dispatch_send", "moe_comm_dispatch_unpack", "moe_comm_dispatch_forward")


@pytest.fixture
def launched(cuda, monkeypatch):
    """[(kernel, blocks)] since it was cleared, of both ranks."""
    found, run = [], fused.run

    def noted(kernel, arguments, num_blocks, *rest):
        found.append((kernel, num_blocks))
        run(kernel, arguments, num_blocks, *rest)

    monkeypatch.setattr(fused, "run", noted)
    return found


def most(launched):
    """Of kernels that move rows, and of any; then forgotten."""
    of_rows = [blocks for kernel, blocks in launched if kernel in OF_ROWS or "combine" in kernel]
    of_any = [blocks for _, blocks in launched]
    launched.clear()
    return max(of_rows), max(of_any)


def round_trip(buffer, rank, group):
    case = make_case(2, tokens=[8, 5], num_experts=8)
    got = dispatch(buffer, case, rank)
    check_dispatched(got, expected(case), rank)
    buffer.combine(got.x, got.handle)
    group.gather(None)  # the other one has launched all of its own


@pytest.mark.parametrize("hops, ranks_per_node", [("rank", 2), ("rank", 1), ("node", 1)])
def test_of_a_buffer(launched, hops, ranks_per_node):
    everything = fused.default_blocks(torch.device("cpu"))
    streams = 2 if hops == "node" else 1  # between nodes, that of the forwarder
    found = []

    def body(group, rank):
        with moe_comm.Buffer(
            group, device="cpu", hops=hops, ranks_per_node=ranks_per_node, num_sms=3, timeout_s=10, **SIZES
        ) as buffer:  # fmt: skip
            for num_sms in (3, 1, 0, 40):
                assert buffer.num_sms == 3 or found
                group.gather(None)
                buffer.num_sms = num_sms
                round_trip(buffer, rank, group)
                if rank == 0:
                    found.append(most(launched))
                group.gather(None)
            for bad in (-1, 1.5, None):
                with pytest.raises(ArgumentError, match="num_sms: expected an int >= 0"):
                    buffer.num_sms = bad
            assert buffer.num_sms == 40

    on_threads(body)
    three, one, unbound, forty = found
    assert three == (3 // streams, 3 // streams) and one == (1, 1)
    assert unbound[0] == everything and forty[0] == 40 // streams


def test_by_variable(launched, monkeypatch):
    monkeypatch.setenv("MOE_COMM_NUM_SMS", "2")

    def body(group, rank):
        with moe_comm.Buffer(group, device="cpu", timeout_s=10, **SIZES) as buffer:
            round_trip(buffer, rank, group)

    on_threads(body)
    assert most(launched) == (2, 2)


def test_of_deep_ep(launched, monkeypatch):
    """As DeepEP: set_num_sms or a Config in normal mode; low-latency calls take all."""
    monkeypatch.setenv("MOE_COMM_DEVICE", "cpu")
    monkeypatch.setattr(deep_ep.Buffer, "num_sms", 20)
    case = make_case(2, tokens=[8, 5], num_experts=8)
    found = {}

    def body(group, rank):
        buffer = deep_ep.Buffer(group, low_latency_mode=True, explicitly_destroy=True)
        layout = buffer.get_dispatch_layout(case.idx[rank], 8)
        x, idx, weights = case.xs[rank], case.idx[rank], case.weights[rank]

        def normal(config):
            per_rank, _, per_expert, there, _ = layout
            x_, _, _, _, handle, _ = buffer.dispatch(
                x, num_tokens_per_rank=per_rank, is_token_in_rank=there, num_tokens_per_expert=per_expert,
                topk_idx=idx, topk_weights=weights, config=config,
            )  # fmt: skip
            buffer.combine(x_, handle, config=config)

        def low_latency():
            wide = torch.zeros(len(x), 512, dtype=torch.bfloat16)
            packed, _, handle, _, _ = buffer.low_latency_dispatch(wide, idx, 8, 8, use_fp8=False)
            buffer.low_latency_combine(packed, idx, weights, handle)

        def step(name, call):
            group.gather(None)
            call()
            group.gather(None)
            if rank == 0:
                found[name] = most(launched)[0]

        passed = []
        group.gather(None)
        launched.clear()
        step("default", lambda: normal(None))
        step("config", lambda: normal(deep_ep.Config(2)))
        group.gather(None)
        deep_ep.Buffer.set_num_sms(6)
        step("set", lambda: normal(None))
        step("low-latency", low_latency)
        buffer.destroy()
        elastic = deep_ep.ElasticBuffer(
            group, num_max_tokens_per_rank=8, hidden=64, explicitly_destroy=True
        )

        def expanded(num_sms, of_combine):
            got, *_, handle, _ = elastic.dispatch(x, idx, weights, num_experts=8, num_sms=num_sms)
            elastic.combine(got, handle, num_sms=of_combine)

        group.gather(None)
        launched.clear()
        step("elastic", lambda: expanded(0, 0))
        step("elastic, 10", lambda: expanded(10, 0))
        step("elastic, 10 and 12", lambda: expanded(10, 12))
        elastic.destroy()
        with pytest.raises(
            ArgumentError, match="num_sms_combine_api: expected an int >= 0 or None"
        ):
            deep_ep.HybridEPBuffer(group, 64, 8, 4, num_sms_combine_api=-1)
        hybrid = deep_ep.HybridEPBuffer(
            group, 64, 8, 4, num_sms_dispatch_api=7, num_sms_combine_api=9
        )
        group.gather(None)
        launched.clear()
        step(
            "hybrid, dispatch",
            lambda: passed.append(hybrid.dispatch(x, topk_idx=idx, num_of_experts=8)),
        )
        handle = passed[-1]
        step("hybrid, combine", lambda: hybrid.combine(handle[0], handle=handle[3]))

    on_threads(body)
    everything = fused.default_blocks(torch.device("cpu"))
    assert found == {
        "default": 20, "config": 2, "set": 6, "low-latency": everything, "elastic": 24, "elastic, 10": 10,
        "elastic, 10 and 12": 12, "hybrid, dispatch": 7, "hybrid, combine": 9,
    }  # fmt: skip
