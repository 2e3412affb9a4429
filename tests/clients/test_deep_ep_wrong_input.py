"""Wrong input on one rank, for each method of ElasticBuffer and HybridEPBuffer: all raise, and the next call works.

The rank raises ArgumentError, the others PeerError with its text; where ranks pass different but possible things, all
raise MismatchError. In real processes over gloo.
"""

import pytest
import torch
from deep_ep_oracle import make_case, open_gloo

import moe_comm
from moe_comm import deep_ep

WORLDS = [(2, 0), (4, 2)]  # ranks, ranks per pretended node
HIDDEN, TOPK, EXPERTS, M, WRONG = 64, 3, 12, 24, 1
DIFFERS = "differs"  # instead of a text: all raise MismatchError


@pytest.fixture(params=WORLDS, ids=lambda w: f"{w[0]} ranks, nodes of {w[1] or w[0]}")
def world(request, run_ranks, monkeypatch, tmp_path):
    num_ranks, ranks_per_node = request.param
    if ranks_per_node:
        monkeypatch.setenv("MOE_COMM_RANKS_PER_NODE", str(ranks_per_node))
    monkeypatch.setenv("MOE_COMM_TIMEOUT_S", "10")
    return lambda fn: run_ranks(fn, num_ranks, num_ranks, str(tmp_path / "gloo"))


class Checks:
    """`refused(text, **changes)`: `call` with `changes` on one rank; afterwards `works()` on all."""

    def __init__(self, rank, call, given, works):
        self.rank, self.call, self.given, self.works = rank, call, given, works

    def refused(self, text, **changes):
        kind = moe_comm.ArgumentError if self.rank == WRONG else moe_comm.PeerError
        if text is DIFFERS:
            kind, text = moe_comm.MismatchError, ""
        with pytest.raises(kind, match=text) as caught:
            self.call(**{**self.given, **(changes if self.rank == WRONG else {})})
        if kind is moe_comm.PeerError:
            assert f"rank {WRONG}" in str(caught.value)
        self.works()


def case_of(num_ranks):
    return make_case([9, 6, 17, 3][:num_ranks], topk=TOPK, num_experts=EXPERTS, hidden=HIDDEN)


def changed(tensor, place, value):
    out = tensor.clone()
    out[place] = value
    return out


# --- ElasticBuffer -------------------------------------------------------------------------------


def check_elastic_dispatch(rank, group, num_ranks, store):
    buffer = deep_ep.ElasticBuffer(
        open_gloo(rank, num_ranks, store), num_max_tokens_per_rank=M, hidden=HIDDEN, num_topk=TOPK
    )
    case = case_of(num_ranks)
    x, idx, weights = case.xs[rank], case.idx[rank], case.weights[rank]
    want = buffer.dispatch(x, idx, weights, num_experts=EXPERTS)[0]

    def works():
        got, *_, handle, _ = buffer.dispatch(x, idx, weights, num_experts=EXPERTS)
        assert torch.equal(got, want)
        buffer.combine(got, handle)

    stats = torch.zeros(EXPERTS // num_ranks, dtype=torch.int32)
    for expand in (False, True):
        given = {
            "x": x, "topk_idx": idx, "topk_weights": weights, "num_experts": EXPERTS, "do_expand": expand,
        }  # fmt: skip
        refused = Checks(rank, buffer.dispatch, given, works).refused
        refused("x: expected", x=x[0])
        refused("x: expected", x=None)
        refused("x: expected rows of a multiple of 16 bytes", x=x[:, :3].contiguous())
        refused("topk_idx: expected", x=x[1:])
        refused("x: expected at most num_max_tokens_per_rank = 2", num_max_tokens_per_rank=2)
        refused(DIFFERS, x=x.float())
        refused(DIFFERS, x=x[:, :32].contiguous())
        refused("topk_idx: expected int64", topk_idx=idx.short())
        refused("topk_idx: expected", topk_idx=idx[:, 0])
        refused("topk_idx: expected", topk_idx=idx[1:])
        refused("topk_idx: expected int64", topk_idx=None)
        refused("topk_idx", topk_idx=changed(idx, (2, 1), EXPERTS))
        refused("topk_idx", topk_idx=changed(idx, (2, 1), -2))
        refused("topk_idx", topk_idx=changed(idx, 0, 5))  # one expert three times
        refused(DIFFERS, topk_idx=idx[:, :2].contiguous(), topk_weights=weights[:, :2])
        refused("topk_weights: expected", topk_weights=weights.double())
        refused("topk_weights: expected", topk_weights=weights[:, :2])
        refused(DIFFERS, topk_weights=None)
        refused("num_experts: expected", num_experts=0)
        refused(DIFFERS, num_experts=EXPERTS + num_ranks)
        refused("alignment: expected", expert_alignment=0)
        refused("recv_stats: expected int32", cumulative_local_expert_recv_stats=stats.long())
        refused("recv_stats: expected int32", cumulative_local_expert_recv_stats=stats[1:])
        refused("previous_event: expected", previous_event=3)
        refused("previous_event_before_epilogue: expected", previous_event_before_epilogue="")
        refused("x: expected a tensor, or a pair", x=(x, x, x))
        refused(r"x\[1\]: expected", x=(x, torch.zeros(len(x) + 1, 4)))
        refused(r"x\[1\]: expected", x=(x, 3))
        refused(DIFFERS, x=(x, torch.zeros(len(x), 4)))
        refused("handle: expected the EPHandle", handle=3)

        *_, handle, _ = buffer.dispatch(**given)
        again = {"x": x, "handle": handle, "topk_weights": weights, "do_expand": expand}
        refused = Checks(rank, buffer.dispatch, again, works).refused
        refused("x: expected", x=x[1:], topk_weights=None)
        refused("x: expected", x=x[0])
        refused(DIFFERS, x=x.double())
        refused("topk_weights: expected", topk_weights=weights[1:])
        refused("topk_weights: expected", topk_weights=idx)
        refused(DIFFERS, topk_weights=None)
        refused(r"x\[1\]: expected", x=(x, torch.zeros(len(x), 4).half()))
        refused("topk_idx: expected None", topk_idx=idx)
        refused("num_experts: expected 12, the handle's", num_experts=24)
        refused("num_max_tokens_per_rank: expected", num_max_tokens_per_rank=M + 1)
        refused("expert_alignment: expected 1, the handle's", expert_alignment=4)
        refused("do_cpu_sync: expected False", do_cpu_sync=True)
        refused("recv_stats: expected None", cumulative_local_expert_recv_stats=stats)
        refused("handle: expected the EPHandle", handle=(1, 2))


def test_elastic_dispatch(world):
    world(check_elastic_dispatch)


def check_elastic_combine(rank, group, num_ranks, store):
    process_group = open_gloo(rank, num_ranks, store)
    case = case_of(num_ranks)
    for multiple in (True, False):
        buffer = deep_ep.ElasticBuffer(
            process_group, num_max_tokens_per_rank=M, hidden=HIDDEN, allow_multiple_reduction=multiple
        )  # fmt: skip
        for expand in (False, True):
            y, _, weights, handle, _ = buffer.dispatch(
                case.xs[rank], case.idx[rank], case.weights[rank], num_experts=EXPERTS, do_expand=expand
            )  # fmt: skip
            want, bias = buffer.combine(y, handle)[0], case.xs[rank]

            def works(y=y, handle=handle, want=want, buffer=buffer):
                assert torch.equal(buffer.combine(y, handle)[0], want)

            with_weights = multiple or not expand
            given = {"x": y, "handle": handle, "bias": bias}
            given["topk_weights"] = weights if with_weights else None
            refused = Checks(rank, buffer.combine, given, works).refused
            refused("x: expected a tensor of", x=y[1:])
            refused("x: expected a tensor of", x=None)
            refused("expected", x=y[:, 0])
            refused("y: expected bfloat16, float16", x=y.int(), bias=None)
            refused("bias: expected", x=y.double())
            refused("bias: expected", bias=bias[1:])
            refused("bias: expected", bias=bias.double())
            refused("bias: expected", bias=3)
            refused("bias: expected", bias=(bias,))
            refused("bias: expected", bias=(bias, None))
            refused("handle: expected the EPHandle", handle=None)
            if with_weights:
                refused("topk_weights: expected", topk_weights=weights[1:])
                refused("topk_weights: expected", topk_weights=weights.double())
                refused("topk_weights: expected", topk_weights=weights[..., None])
                refused(DIFFERS, topk_weights=None)
            else:
                refused("topk_weights: expected None without", topk_weights=weights)
            refused("previous_event: expected", previous_event=object())
            kept = handle.recv_src_metadata
            if rank == WRONG:
                handle.recv_src_metadata = changed(kept, (0, 0), 10**6)
            kind = moe_comm.ArgumentError if rank == WRONG else moe_comm.PeerError
            with pytest.raises(kind, match=r"handle\.recv_src_metadata: expected"):
                buffer.combine(**given)
            handle.recv_src_metadata = kept
            works()


def test_elastic_combine(world):
    world(check_elastic_combine)


# --- constructors --------------------------------------------------------------------------------


def check_constructors(rank, group, num_ranks, store):
    process_group = open_gloo(rank, num_ranks, store)
    elastic = {
        "group": process_group,
        "num_max_tokens_per_rank": M,
        "hidden": HIDDEN,
        "num_topk": TOPK,
    }

    def works():
        buffer = deep_ep.ElasticBuffer(**elastic)
        buffer.barrier()

    refused = Checks(rank, deep_ep.ElasticBuffer, elastic, works).refused
    refused("num_bytes: expected an int, or", hidden=0)
    refused("num_bytes: expected a multiple", num_bytes=1 << 20)
    refused("hidden: expected an int", hidden=64.5)
    refused("num_topk: expected an int", num_topk=-1)
    refused("num_cpu_timeout_secs: expected seconds", num_cpu_timeout_secs="300")
    refused(DIFFERS, hidden=2 * HIDDEN)
    hybrid = {"group": process_group, "hidden_dim": HIDDEN, "max_num_of_tokens_per_rank": M}
    hybrid["num_local_experts"] = EXPERTS // num_ranks
    refused = Checks(rank, deep_ep.HybridEPBuffer, hybrid, works).refused
    refused("hidden_dim: expected", hidden_dim=0)
    refused("max_num_of_tokens_per_rank: expected", max_num_of_tokens_per_rank=None)
    refused("num_local_experts: expected", num_local_experts="8")

    legacy = {"group": process_group, "num_nvl_bytes": 1 << 20, "low_latency_mode": True}
    refused = Checks(rank, deep_ep.Buffer, legacy, works).refused
    refused("num_nvl_bytes: expected an int >= 0", num_nvl_bytes=-128)
    refused("num_nvl_bytes: expected an int >= 0", num_nvl_bytes=1e9)
    refused("num_rdma_bytes: expected an int >= 0", num_rdma_bytes=None)
    for name, other in {
        "num_nvl_bytes": 2 << 20, "num_rdma_bytes": 128, "low_latency_mode": False, "enable_shrink": True
    }.items():  # fmt: skip
        with pytest.raises(moe_comm.MismatchError, match=f"{name}: rank 1 passed {other}, rank 0"):
            deep_ep.Buffer(**{**legacy, **({name: other} if rank == WRONG else {})})
        works()


def test_constructors(world):
    world(check_constructors)


# --- HybridEPBuffer ------------------------------------------------------------------------------


def routing_of(case, rank):
    routing = torch.zeros(len(case.xs[rank]), EXPERTS, dtype=torch.bool)
    for t, ids in enumerate(case.idx[rank].tolist()):
        for e in ids:
            if e >= 0:
                routing[t, e] = True
    return routing, torch.rand(routing.shape) * routing


def check_hybrid_dispatch(rank, group, num_ranks, store):
    buffer = deep_ep.HybridEPBuffer(
        open_gloo(rank, num_ranks, store), HIDDEN, M, EXPERTS // num_ranks
    )
    case = case_of(num_ranks)
    x, idx, weights = case.xs[rank], case.idx[rank], case.weights[rank]
    routing, probs = routing_of(case, rank)
    by_map = {"hidden": x, "routing_map": routing, "probs": probs}
    by_ids = {"hidden": x, "topk_idx": idx, "topk_weights": weights, "num_of_experts": EXPERTS}
    want = buffer.dispatch(**by_map)[0]

    def works():
        got, *_, handle = buffer.dispatch(**by_map)
        assert torch.equal(got, want)
        buffer.combine(got, handle=handle)

    for method in (buffer.dispatch, buffer.dispatch_with_permute):
        permutes = method == buffer.dispatch_with_permute
        for given in (by_map, by_ids):
            refused = Checks(rank, method, given, works).refused
            refused("hidden: expected a tensor", hidden=None)
            refused("expected", hidden=x[0])
            refused("rows of a multiple of 16 bytes", hidden=x[:, :3])
            refused(DIFFERS, hidden=x.float())
            refused(r"x\[1\]: expected", scaling_factor=torch.zeros(len(x) + 1, 4))
            refused(r"x\[1\]: expected", scaling_factor=torch.zeros(len(x)))
            refused(DIFFERS, scaling_factor=torch.zeros(len(x), 4))
            refused("routing_map: expected it or topk_idx", routing_map=routing, topk_idx=idx)
            refused("handle: expected one of HybridEPBuffer", handle=(1, 2))
            if permutes:
                refused("num_permuted_tokens: expected an int", non_blocking=True)
                refused("", num_permuted_tokens="many")
                refused("alignment: expected", pad_multiple=-1)
        refused = Checks(rank, method, by_map, works).refused
        refused("routing_map: expected bool", routing_map=routing[1:])
        refused("routing_map: expected bool", routing_map=routing[0])
        refused("routing_map: expected bool", routing_map=routing.tolist())
        refused("routing_map: expected bool", num_of_experts=EXPERTS + 1)
        refused("probs: expected float32", probs=probs[:, 1:])
        refused("probs: expected float32", probs=3)
        refused(DIFFERS, probs=None)
        refused = Checks(rank, method, by_ids, works).refused
        refused("topk_idx: expected int64", topk_idx=idx.float())
        refused("topk_idx: expected", topk_idx=idx[1:])
        refused("topk_idx", topk_idx=changed(idx, (1, 1), EXPERTS))
        refused("topk_idx", topk_idx=changed(idx, (1, 1), -3))
        refused("topk_weights: expected", topk_weights=weights[1:])
        refused("topk_weights: expected", topk_weights=weights.double())
        refused("num_of_experts: expected an int", num_of_experts=None)
        refused("num_experts: expected", num_of_experts=-1)
        refused(DIFFERS, num_of_experts=EXPERTS + num_ranks)

        handle = method(**by_map)[-1]
        again = {"hidden": x, "handle": handle, "probs": probs}
        refused = Checks(rank, method, again, works).refused
        refused("expected", hidden=x[1:])
        refused("expected", hidden=None)
        refused(DIFFERS, hidden=x.double())
        refused("probs: expected float32", probs=probs[1:])
        refused(r"x\[1\]: expected", scaling_factor=torch.zeros(len(x), 4).half())
        refused(DIFFERS, probs=None)
        if permutes:
            refused("pad_multiple: expected 1, the handle's", pad_multiple=8)


def test_hybrid_dispatch(world):
    world(check_hybrid_dispatch)


def check_hybrid_combine(rank, group, num_ranks, store):
    buffer = deep_ep.HybridEPBuffer(
        open_gloo(rank, num_ranks, store), HIDDEN, M, EXPERTS // num_ranks
    )
    case = case_of(num_ranks)
    routing, probs = routing_of(case, rank)
    by_map = {"hidden": case.xs[rank], "routing_map": routing, "probs": probs}
    for dispatch, combine in (
        (buffer.dispatch, buffer.combine),
        (buffer.dispatch_with_permute, buffer.combine_with_unpermute),
    ):
        y, dense, *_, handle = dispatch(**by_map)
        want = combine(hidden=y, handle=handle)[0]

        def works(combine=combine, y=y, handle=handle, want=want):
            assert torch.equal(combine(hidden=y, handle=handle)[0], want)

        given = {"hidden": y, "probs": dense, "handle": handle}
        refused = Checks(rank, combine, given, works).refused
        refused("hidden: expected", hidden=y[1:])
        refused("hidden: expected", hidden=None)
        refused("hidden: expected", hidden=y[:, 0])
        refused("rows of a multiple of 16 bytes", hidden=y[:, :3])
        refused("y: expected bfloat16, float16", hidden=y.int())
        refused(DIFFERS, hidden=y.float())
        refused("probs: expected float32", probs=dense[1:])
        refused("probs: expected float32", probs=3)
        refused(DIFFERS, probs=None)
        refused("handle: expected one of HybridEPBuffer", handle=None)


def test_hybrid_combine(world):
    world(check_hybrid_combine)
