"""Every Triton kernel against its torch twin, interpreted on CPU tensors: bit for bit, all layouts and dtypes."""

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from test_kernels import bits, lanes_of, make_terms, random_bytes, random_topk, rows_with_ids

from moe_comm.kernels import TORCH, TRITON, scan
from moe_comm.layout import RowFormat

FLOATS = [torch.bfloat16, torch.float16, torch.float32, torch.float64]
GARBAGE = 0xA5
seeds = st.integers(0, 2**31)
checked = settings(  # interpreted kernels are too slow to shrink with
    max_examples=12,
    deadline=None,
    phases=[Phase.explicit, Phase.reuse, Phase.generate],
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


def same(a, b):
    if a is None or b is None:
        return a is b
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(bits(a), bits(b))


def number(n):
    return None if n is None else torch.tensor([n], dtype=torch.int32)


@pytest.fixture(
    params=[scan.MAX_BLOCKS, 2], ids=["one step in a block", "several steps in a block"]
)
def blocks(request, monkeypatch):
    monkeypatch.setattr(scan, "MAX_BLOCKS", request.param)


# --- route -----------------------------------------------------------------------------------------


@checked
@given(
    num_tokens=st.integers(0, 150), topk=st.integers(1, 9), num_experts=st.integers(1, 70),
    nodes=st.tuples(st.integers(1, 5), st.integers(0, 3)), capacity=st.integers(1, 160),
    limit=st.none() | st.integers(0, 160), none=st.sampled_from([0.0, 0.2, 1.0]), seed=seeds,
)  # fmt: skip
def test_route(blocks, num_tokens, topk, num_experts, nodes, capacity, limit, none, seed):
    num_nodes, node_ranks = nodes
    num_ranks = num_nodes * max(1, node_ranks)
    idx = random_topk(num_tokens, topk, num_experts, seed, none)
    if seed % 3 == 0:
        idx = idx.t().contiguous().t()  # strides (1, T)
    lanes, num_lanes = lanes_of(num_ranks, node_ranks)
    options = {
        "num_experts": num_experts, "num_ranks": num_ranks, "num_lanes": num_lanes, "capacity": capacity,
        "num_tokens": number(limit),
    }  # fmt: skip
    lanes = torch.tensor(lanes, dtype=torch.int32)
    want, got = (kernels.route(idx, lanes, **options) for kernels in (TORCH, TRITON))
    for name, a, b in zip(want._fields, want, got):
        assert same(a, b), name
    starts = [k.round_starts(want.lane_rows, capacity=1 + capacity // 2) for k in (TORCH, TRITON)]
    assert same(*starts)
    if limit is not None:
        assert (got.lane_rows[limit:] == -1).all()


@checked
@given(
    num_tokens=st.integers(1, 80), topk=st.integers(1, 6), num_errors=st.integers(0, 4),
    limit=st.none() | st.integers(0, 80), seed=seeds,
)  # fmt: skip
def test_the_first_error(blocks, num_tokens, topk, num_errors, limit, seed):
    """Out of range, and twice, wherever they are; beyond `num_tokens` nothing is an error."""
    g = torch.Generator().manual_seed(seed)
    idx = random_topk(num_tokens, topk, 9, seed)
    for _ in range(num_errors):
        t, k, j = (int(torch.randint(0, n, (), generator=g)) for n in (num_tokens, topk, topk))
        idx[t, k] = [9, -2, 1 << 40, int(idx[t, j])][int(torch.randint(0, 4, (), generator=g))]
    lanes = torch.arange(3, dtype=torch.int32)
    want, got = (
        k.route(idx, lanes, num_experts=9, num_ranks=3, num_lanes=3, capacity=8, num_tokens=number(limit))
        for k in (TORCH, TRITON)
    )  # fmt: skip
    assert got.error.tolist() == want.error.tolist()


# --- pack ------------------------------------------------------------------------------------------

PAYLOADS = [torch.bfloat16, torch.float64, torch.float8_e4m3fn, torch.uint8, torch.float32]


@checked
@given(
    num_tokens=st.integers(1, 24), units=st.sampled_from([1, 2, 5, 300]), dtype=st.sampled_from(PAYLOADS),
    scales=st.sampled_from([None, (torch.float32, 7), (torch.uint8, 5), (torch.int32, 70)]),
    parts=st.sampled_from(["ids and weights", "ids", "cached"]), topk=st.sampled_from([1, 3, 8, 70]),
    shape=st.sampled_from(["dense", "gaps", "columns", "one byte off"]), capacity=st.integers(1, 30), seed=seeds,
)  # fmt: skip
def test_pack(num_tokens, units, dtype, scales, parts, topk, shape, capacity, seed):
    hidden = units * 16 // dtype.itemsize
    x = random_bytes(num_tokens, 2 * units * 16 + 16, seed).view(dtype)
    if shape == "dense":
        x = x[:, :hidden].contiguous()
    elif shape == "gaps":
        x = x[:, :hidden]
    elif shape == "columns":
        x = x[:, ::2][:, :hidden]
    else:
        x = x[:, 1 : 1 + hidden]
    s = None
    if scales:
        s = random_bytes(num_tokens, scales[1] * scales[0].itemsize, seed=2).view(scales[0])
        s = s.t().contiguous().t() if seed % 2 else s
    idx, weights = random_topk(num_tokens, topk, 8, seed), torch.rand(num_tokens, topk)
    cached, with_weights = parts == "cached", parts == "ids and weights"
    f = RowFormat.of_dispatch(
        units * 16, 0 if s is None else s.shape[1] * s.element_size(), topk, weights=with_weights, cached=cached
    )  # fmt: skip
    lanes, num_lanes = lanes_of(4, 2)
    routed = TORCH.route(
        idx, torch.tensor(lanes, dtype=torch.int32), num_experts=8, num_ranks=4, num_lanes=num_lanes, capacity=capacity
    )  # fmt: skip
    round_idx = seed % (len(routed.round_starts) - 1)
    first, last = round_idx * capacity, min(num_tokens, (round_idx + 1) * capacity)
    for lane in range(num_lanes):
        windows = [
            torch.full((capacity, f.row_bytes), GARBAGE, dtype=torch.uint8) for _ in range(2)
        ]
        for kernels, window in zip((TORCH, TRITON), windows):
            kernels.pack(
                window, x, routed.lane_rows, routed.round_starts[round_idx], scales=s,
                topk_idx=None if cached else idx, topk_weights=weights if with_weights else None, lane=lane,
                first_token=first, last_token=last, scales_at=f.scales_at, token_at=f.token_at, ids_at=f.ids_at,
                weights_at=f.weights_at,
            )  # fmt: skip
        assert torch.equal(*windows)


# --- forward ---------------------------------------------------------------------------------------


@checked
@given(
    num_rows=st.integers(0, 90), node_ranks=st.integers(1, 5), num_nodes=st.integers(1, 4), topk=st.integers(1, 9),
    num_experts=st.integers(1, 70), limit=st.none() | st.integers(0, 90), seed=seeds,
)  # fmt: skip
def test_forward(blocks, num_rows, node_ranks, num_nodes, topk, num_experts, limit, seed):
    num_ranks = node_ranks * num_nodes
    g = torch.Generator().manual_seed(seed)
    local_of_rank = torch.full((num_ranks,), -1, dtype=torch.int32)
    here = torch.randperm(num_ranks, generator=g)[:node_ranks]
    local_of_rank[here] = torch.arange(node_ranks, dtype=torch.int32)
    f = RowFormat.of_dispatch(32, 0, topk, weights=True)
    ids = random_topk(num_rows, topk, num_experts, seed)
    link = rows_with_ids(ids, torch.arange(num_rows) * 2 + 5, f, seed)
    starts = torch.randint(0, 9, (node_ranks,), generator=g, dtype=torch.int32)
    want, got = (
        k.forward_tables(
            link, local_of_rank, starts, experts_per_rank=-(-num_experts // num_ranks), topk=topk,
            token_at=f.token_at, ids_at=f.ids_at, num_rows=number(limit),
        )
        for k in (TORCH, TRITON)
    )  # fmt: skip
    assert same(want.tokens, got.tokens) and same(want.rows, got.rows)
    for local in range(node_ranks):
        windows = [
            torch.full((num_rows + 1, f.row_bytes), GARBAGE, dtype=torch.uint8) for _ in range(2)
        ]
        for kernels, window in zip((TORCH, TRITON), windows):
            kernels.forward(window, link, want.rows, starts, local=local)
        assert torch.equal(*windows)


# --- unpack ----------------------------------------------------------------------------------------


@checked
@given(
    num_rows=st.integers(0, 90), topk=st.integers(1, 9), num_local=st.integers(0, 40), weights=st.booleans(),
    limit=st.none() | st.integers(0, 90), seed=seeds,
)  # fmt: skip
def test_places(blocks, num_rows, topk, num_local, weights, limit, seed):
    num_experts, first_expert = num_local + 20, 8
    f = RowFormat.of_dispatch(16, 0, topk, weights=weights)
    rows = rows_with_ids(
        random_topk(num_rows, topk, num_experts, seed), torch.arange(num_rows), f, seed
    )
    next_places = torch.arange(num_local, dtype=torch.int32) * 100 + seed % 7
    want, got = (
        k.places(
            rows, next_places, first_expert=first_expert, topk=topk, token_at=f.token_at, ids_at=f.ids_at,
            weights_at=f.weights_at, num_rows=number(limit),
        )
        for k in (TORCH, TRITON)
    )  # fmt: skip
    for name, a, b in zip(want._fields, want, got):
        assert same(a, b), name


@checked
@given(
    num_rows=st.integers(0, 20), hidden=st.sampled_from([8, 24, 20, 7, 2100]), dtype=st.sampled_from(PAYLOADS),
    scales=st.sampled_from([None, (torch.float32, 7), (torch.uint8, 6), (torch.int32, 70)]),
    num_positions=st.sampled_from([1, 3, 8]), num_places=st.integers(1, 60), seed=seeds,
)  # fmt: skip
def test_unpack(num_rows, hidden, dtype, scales, num_positions, num_places, seed):
    """Every place at most once; what is no place of a row stays as it is."""
    g = torch.Generator().manual_seed(seed)
    scale_bytes = scales[1] * scales[0].itemsize if scales else 0
    f = RowFormat.of_dispatch(-(-hidden * dtype.itemsize // 16) * 16, scale_bytes, 2, weights=True)
    rows = random_bytes(num_rows, f.row_bytes, seed)
    places = torch.randperm(max(num_places, num_rows * num_positions), generator=g)
    positions = places[: num_rows * num_positions].view(num_rows, num_positions).int()
    positions = torch.where(positions < num_places, positions, -1)
    ids = torch.randint(-1, 50, (num_rows, num_positions), generator=g)
    for kernels in (TORCH, TRITON):
        x = torch.full((num_places, hidden * dtype.itemsize), GARBAGE, dtype=torch.uint8).view(
            dtype
        )
        s = None
        if scales:
            s = torch.full((num_places, scale_bytes), GARBAGE, dtype=torch.uint8).view(scales[0])
        kernels.unpack(x, rows, positions, out_scales=s, scales_at=f.scales_at)
        by_copy, by_row = (
            torch.full((num_places,), -7),
            torch.full((num_places, num_positions), 0.5),
        )
        kernels.unpack_lanes(by_copy, ids, positions)
        kernels.unpack_lanes(by_row, ids * 0.25, positions[:, :1])
        columns = kernels.lane_columns(torch.arange(num_places) * 0.5, positions)
        if kernels is TORCH:
            want = x, s, by_copy, by_row, columns
        else:
            for a, b in zip(want, (x, s, by_copy, by_row, columns)):
                assert same(a, b)


# --- reduce ----------------------------------------------------------------------------------------


@checked
@given(
    dtype=st.sampled_from(FLOATS), num_rows=st.integers(2, 6), width=st.sampled_from([8, 24, 7, 1030, 2056]),
    num_terms=st.integers(1, 9), weighted=st.booleans(), biased=st.booleans(),
    inner=st.tuples(st.integers(0, 9), st.integers(0, 9)),
    shape=st.sampled_from(["dense", "gaps", "columns"]), limit=st.none() | st.integers(0, 6), seed=seeds,
)  # fmt: skip
def test_reduce(dtype, num_rows, width, num_terms, weighted, biased, inner, shape, limit, seed):
    g = torch.Generator().manual_seed(seed)
    memory, offsets = make_terms(dtype, num_rows, width, num_terms, seed)
    inner = [min(i, num_terms) for i in sorted(inner)]
    weights = torch.randn(num_rows, num_terms, generator=g) if weighted else None
    bias = torch.randn(num_rows, 2 * width, generator=g).to(dtype)
    wide = torch.full((num_rows, 2 * width + 8), 9.0, dtype=dtype)
    outs = []
    for kernels in (TORCH, TRITON):
        out = wide.clone()
        outs.append(out)
        views = {
            "dense": (out.view(-1)[: num_rows * width].view(num_rows, width), bias[:, :width].contiguous()),
            "gaps": (out[:, :width], bias[:, :width]),
            "columns": (out[:, : 2 * width : 2], bias[:, ::2]),
        }  # fmt: skip
        to, start = views[shape]
        kernels.reduce(
            to, memory, offsets, weights=weights, bias=start if biased else None, inner_first=inner[0],
            inner_last=inner[1], num_tokens=number(limit),
        )  # fmt: skip
    assert same(*outs)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_a_single_plain_term_passes_bit_for_bit(dtype):
    pattern = torch.arange(2**16, dtype=torch.int32).to(torch.int16)
    values = pattern.repeat_interleave(dtype.itemsize // 2).view(dtype)
    memory = values.view(torch.uint8)
    for inner in ((0, 0), (0, 2)):
        out = torch.empty((1, len(values)), dtype=dtype)
        TRITON.reduce(
            out, memory, torch.tensor([[-1, 0, -1]]), inner_first=inner[0], inner_last=inner[1]
        )
        assert torch.equal(bits(out[0]), bits(values))


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_a_sum_starts_with_its_first_term(dtype):
    """−0.0 + −0.0, and −0.0 times a weight: a sum that started at 0.0 would be 0.0."""
    memory = torch.zeros(16, dtype=dtype).neg().view(torch.uint8)
    offsets = torch.tensor([[0, -1, -1, -1], [0, 0, -1, 0], [-1, 0, 0, -1]])
    for inner in ((0, 0), (1, 3)):
        for weights in (None, torch.ones(3, 4)):
            out = torch.empty(3, 16, dtype=dtype)
            TRITON.reduce(
                out, memory, offsets, weights=weights, inner_first=inner[0], inner_last=inner[1]
            )
            assert out.signbit().all()


@pytest.mark.parametrize("dtype", FLOATS[:3], ids=str)
def test_rounding_of_every_kind_of_number(dtype):
    patterns = torch.arange(2**16, dtype=torch.int32).to(torch.int16)
    values = patterns.repeat_interleave(dtype.itemsize // 2).view(dtype)
    memory = torch.cat([values, values.flip(0)]).view(torch.uint8)
    offsets = torch.tensor([[0, len(values) * dtype.itemsize]])
    for weights in (None, (0.333, 1.7), (1e-3, 1e-6), (-2.5, 3e4)):
        want, got = (torch.empty((1, len(values)), dtype=dtype) for _ in range(2))
        for kernels, out in ((TORCH, want), (TRITON, got)):
            kernels.reduce(
                out, memory, offsets, weights=None if weights is None else torch.tensor([weights])
            )
        nan = want.isnan()
        assert torch.equal(got.isnan(), nan)
        assert torch.equal(bits(got)[~nan], bits(want)[~nan])


@checked
@given(
    num_rows=st.integers(0, 40),
    num_columns=st.integers(1, 9),
    row_bytes=st.sampled_from([16, 14368]),
    seed=seeds,
)
def test_row_offsets(num_rows, num_columns, row_bytes, seed):
    g = torch.Generator().manual_seed(seed)
    rows = torch.randint(-1, 2**20, (num_columns, num_rows), generator=g, dtype=torch.int32).t()
    starts = torch.randint(0, 9, (num_columns,), generator=g, dtype=torch.int32)
    windows = torch.randint(0, 2**40, (num_columns,), generator=g)
    want, got = (k.row_offsets(rows, starts, windows, row_bytes=row_bytes) for k in (TORCH, TRITON))
    assert same(want, got)


# --- lanes -----------------------------------------------------------------------------------------


@checked
@given(
    num_tokens=st.integers(0, 150), topk=st.integers(1, 9), num_experts=st.integers(1, 40),
    num_ranks=st.integers(1, 5), each_copy=st.booleans(), none=st.sampled_from([0.0, 0.2, 1.0]),
    change=st.sampled_from(["", "another token's", "out of range", "none"]), seed=seeds,
)  # fmt: skip
def test_lane_numbers(num_tokens, topk, num_experts, num_ranks, each_copy, none, change, seed):
    idx = random_topk(num_tokens, topk, num_experts, seed, none)
    lanes = torch.arange(num_ranks, dtype=torch.int32)
    if seed % 4 == 0:
        lanes[seed % num_ranks] = num_ranks  # an absent rank
    routed = TORCH.route(
        idx, lanes, num_experts=num_experts, num_ranks=num_ranks, num_lanes=num_ranks, capacity=max(1, num_tokens)
    )  # fmt: skip
    if num_tokens and change:
        token = seed % num_tokens
        other = {"another token's": idx[token - 1], "out of range": num_experts + 3, "none": -1}
        idx[token] = other[change]
    if seed % 3 == 0:
        idx = idx.t().contiguous().t()
    want, got = (
        k.lane_numbers(
            idx, routed.lane_rows, experts_per_rank=-(-num_experts // num_ranks), num_experts=num_experts,
            each_copy=each_copy,
        )
        for k in (TORCH, TRITON)
    )  # fmt: skip
    assert all(map(same, want, got))
    if change in ("", "out of range") and num_tokens:
        assert want.error[0] == (change != "")


@checked
@given(
    rows=st.lists(st.integers(0, 150), min_size=1, max_size=5), topk=st.integers(1, 9), more=st.integers(0, 3),
    none=st.sampled_from([0.0, 0.6, 1.0]), seed=seeds,
)  # fmt: skip
def test_copy_offsets(rows, topk, more, none, seed):
    """Rows behind the last source's are not looked at."""
    g = torch.Generator().manual_seed(seed)
    rows = torch.tensor(rows, dtype=torch.int32)
    starts = (rows.cumsum(0) - rows).int()
    shape = (int(rows.sum()) + more, topk)
    positions = torch.randint(0, 2**20, shape, generator=g, dtype=torch.int32)
    positions = torch.where(torch.rand(shape, generator=g) < none, -1, positions)
    if seed % 3 == 0:
        positions = positions.t().contiguous().t()
    want, got = (k.copy_offsets(positions, rows, starts, row_bytes=14368) for k in (TORCH, TRITON))
    assert same(want.counts, got.counts) and same(want.firsts, got.firsts)
    for source, (first, count) in enumerate(zip(want.firsts.tolist(), want.counts.tolist())):
        mine = positions[starts[source] : starts[source] + rows[source]]
        right = mine[mine >= 0].long() * 14368
        for found in (want, got):
            assert torch.equal(found.offsets[first : first + count], right)


@checked
@given(
    num_tokens=st.integers(0, 90),
    topk=st.integers(1, 9),
    num_ranks=st.integers(1, 5),
    seed=seeds,
)
def test_lane_offsets(num_tokens, topk, num_ranks, seed):
    g = torch.Generator().manual_seed(seed)
    idx = torch.randint(-1, 3 * num_ranks, (num_tokens, topk), generator=g)
    numbers = torch.randint(0, 40, idx.shape, generator=g, dtype=torch.int32)
    numbers = torch.where((torch.rand(idx.shape, generator=g) < 0.3) | (idx < 0), -1, numbers)
    rows = torch.randint(0, 40, (num_ranks,), generator=g, dtype=torch.int32)
    windows = torch.randint(0, 2**40, (num_ranks,), generator=g)
    want, got = (
        k.lane_offsets(idx, numbers, rows, windows, experts_per_rank=3, row_bytes=14368)
        for k in (TORCH, TRITON)
    )
    assert same(want, got)


@checked
@given(num_ranks=st.integers(1, 9), num_experts=st.integers(0, 9), seed=seeds)
def test_source_ranges(num_ranks, num_experts, seed):
    g = torch.Generator().manual_seed(seed)
    copies = torch.randint(0, 2**20, (num_ranks, num_experts + 2), generator=g, dtype=torch.int32)
    copies = copies[:, :num_experts]
    want, got = (
        (torch.zeros(num_experts, num_ranks, dtype=torch.int64), torch.zeros(num_experts, dtype=torch.int32))
        for _ in range(2)
    )  # fmt: skip
    TORCH.source_ranges(*want, copies)
    TRITON.source_ranges(*got, copies)
    assert all(map(same, want, got))
