"""Each torch twin of kernels/ against its naive definition, and against the C++ loops of csrc/rows.hpp, bit for bit.

The C++ loops that live inside an exchange (forward, unpack) are compared in test_kernels_exchange.py.
"""

import dataclasses
import inspect
import os
import subprocess
import sys

import pytest
import torch

from moe_comm import _engine
from moe_comm.kernels import TORCH, TRITON, for_device
from moe_comm.kernels.route import ERROR_NONE, ERROR_RANGE, ERROR_TWICE
from moe_comm.layout import DTYPE_CODES, RowFormat

FLOATS = [torch.bfloat16, torch.float16, torch.float32, torch.float64]
GARBAGE = 0xA5

# (T, K, E, R, node ranks; 0: every rank is a lane)
ROUTINGS = [
    (0, 2, 4, 2, 1),
    (1, 1, 1, 1, 1),
    (17, 3, 7, 4, 2),  # E % R != 0: the last rank owns fewer experts …
    (9, 2, 3, 4, 0),  # … or none
    (40, 8, 16, 8, 4),
    (33, 5, 64, 6, 0),
    (64, 1, 8, 8, 2),
]


def random_topk(num_tokens, topk, num_experts, seed=0, none=0.2):
    g = torch.Generator().manual_seed(seed)
    ids = torch.rand(num_tokens, num_experts, generator=g).argsort(1)[:, :topk]
    ids = torch.cat([ids, torch.full((num_tokens, topk - ids.shape[1]), -1)], 1)  # K > E
    return torch.where(torch.rand(ids.shape, generator=g) < none, -1, ids)


def random_bytes(num_rows, num_bytes, seed):
    g = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (num_rows, num_bytes), generator=g, dtype=torch.uint8)


def lanes_of(num_ranks, node_ranks, node=0):
    """(lane_of_rank, D): hops="node" as seen from `node`, or a lane per rank."""
    if not node_ranks:
        return list(range(num_ranks)), num_ranks
    places = [divmod(r, node_ranks) for r in range(num_ranks)]
    lanes = [local if n == node else node_ranks + n for n, local in places]
    return lanes, node_ranks + num_ranks // node_ranks


def cpp_route(idx, num_experts, lanes, num_lanes):
    rows = torch.full((len(idx), num_lanes), -7, dtype=torch.int32)
    out = _engine.rows.route(
        idx.data_ptr(), *idx.shape, num_experts, lanes, num_lanes, rows.data_ptr()
    )
    return rows, out


def bits(values):
    """As integers: NaNs and signs of zeros count."""
    sizes = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    return values.contiguous().view(sizes[values.element_size()])


# --- route -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("routing", ROUTINGS, ids=str)
@pytest.mark.parametrize("kind", ["uniform", "none", "hot"])
def test_route(routing, kind):
    num_tokens, topk, num_experts, num_ranks, node_ranks = routing
    idx = random_topk(num_tokens, topk, num_experts)
    if kind != "uniform":
        idx = torch.full_like(idx, -1)
    if kind == "hot":
        idx[:, -1] = num_experts - 1
    lanes, num_lanes = lanes_of(num_ranks, node_ranks)
    capacity = 5
    got = TORCH.route(
        idx, torch.tensor(lanes, dtype=torch.int32), num_experts=num_experts, num_ranks=num_ranks,
        num_lanes=num_lanes, capacity=capacity,
    )  # fmt: skip

    per_rank = -(-num_experts // num_ranks)
    want = torch.full((num_tokens, num_lanes), -1, dtype=torch.int32)
    next_row, ranks, experts = [0] * num_lanes, [0] * num_ranks, [0] * (num_ranks * per_rank)
    starts = []
    for t, ids in enumerate(idx.tolist()):
        if t % capacity == 0:
            starts.append(list(next_row))
        for e in ids:
            if e >= 0:
                experts[e] += 1
        owners = {e // per_rank for e in ids if e >= 0}
        for r in owners:
            ranks[r] += 1
        for lane in {lanes[r] for r in owners}:
            want[t, lane] = next_row[lane]
            next_row[lane] += 1
    assert torch.equal(got.lane_rows, want)
    assert got.round_starts.tolist() == (starts or [next_row]) + [next_row]
    assert got.lane_counts.tolist() == next_row
    assert (got.rank_counts.tolist(), got.expert_counts.tolist()) == (ranks, experts)
    assert got.error.tolist() == [ERROR_NONE, 0, 0]
    assert {t.dtype for t in got} == {torch.int32}

    rows, (error, *counts) = cpp_route(idx, num_experts, lanes, num_lanes)
    assert torch.equal(got.lane_rows, rows)
    assert counts == [next_row, ranks, experts] and not error


@pytest.mark.parametrize(
    "at, kind",
    [
        ({(4, 1): 8}, ERROR_RANGE),
        ({(4, 2): -2}, ERROR_RANGE),
        ({(3, 0): 1 << 40}, ERROR_RANGE),
        ({(2, 0): 5, (2, 2): 5}, ERROR_TWICE),
        ({(2, 0): 5, (2, 2): 5, (1, 2): 9}, ERROR_RANGE),  # the first one counts
        ({(0, 0): 6, (0, 1): 6, (1, 2): 9}, ERROR_TWICE),
        ({(1, 0): 6, (1, 1): 6, (1, 2): 9}, ERROR_TWICE),
        ({(1, 0): 9, (1, 1): 6, (1, 2): 6}, ERROR_RANGE),
        ({(1, 0): 6, (1, 1): 9, (1, 2): 6}, ERROR_RANGE),  # twice is the second time
        ({(5, 0): -1, (5, 1): -1, (5, 2): -1}, ERROR_NONE),  # none, as often as you like
    ],
    ids=str,
)
def test_route_finds_the_first_error(at, kind):
    idx = torch.tensor([[0, 1, 2]] * 6)
    for entry, expert in at.items():
        idx[entry] = expert
    lanes, num_lanes = lanes_of(4, 2)
    got = TORCH.route(
        idx, torch.tensor(lanes, dtype=torch.int32), num_experts=8, num_ranks=4, num_lanes=num_lanes, capacity=4
    )  # fmt: skip
    found, token, entry = got.error.tolist()
    text = cpp_route(idx, 8, lanes, num_lanes)[1][0]
    assert found == kind
    if kind == ERROR_NONE:
        assert not text
    elif kind == ERROR_RANGE:
        assert text.endswith(f"got {int(idx[token, entry])} at [{token}, {entry}]")
    else:
        assert text.endswith(f"got expert {int(idx[token, entry])} twice at token {token}")


# --- pack ------------------------------------------------------------------------------------------

PAYLOADS = [torch.bfloat16, torch.float64, torch.float8_e4m3fn, torch.uint8]
SCALES = [None, (torch.float32, "rows"), (torch.float32, "columns"), (torch.uint8, "columns")]


@pytest.mark.parametrize("dtype", PAYLOADS, ids=str)
@pytest.mark.parametrize("scales", SCALES, ids=str)
@pytest.mark.parametrize("parts", ["ids and weights", "ids", "cached"])
def test_pack(dtype, scales, parts):
    num_tokens, hidden, topk, num_experts, capacity = 23, 32, 3, 8, 7
    x = random_bytes(num_tokens, 2 * hidden * dtype.itemsize, seed=1)
    x = x.view(dtype)[:, :hidden]  # rows with gaps between them
    s = None
    if scales:
        s = random_bytes(num_tokens, 5 * scales[0].itemsize, seed=2).view(scales[0])
        s = s.t().contiguous().t() if scales[1] == "columns" else s
    idx, weights = random_topk(num_tokens, topk, num_experts), torch.rand(num_tokens, topk)
    cached, with_weights = parts == "cached", parts == "ids and weights"
    f = RowFormat.of_dispatch(
        hidden * dtype.itemsize, 0 if s is None else 5 * s.element_size(), topk, weights=with_weights, cached=cached
    )  # fmt: skip
    lanes, num_lanes = lanes_of(4, 2)
    format_numbers = tuple(getattr(f, field.name) for field in dataclasses.fields(f))
    routed = TORCH.route(
        idx, torch.tensor(lanes, dtype=torch.int32), num_experts=num_experts, num_ranks=4, num_lanes=num_lanes,
        capacity=capacity,
    )  # fmt: skip
    packed = 0
    for round_idx in range(len(routed.round_starts) - 1):
        first = round_idx * capacity
        last = min(num_tokens, first + capacity)
        for lane in range(num_lanes):
            got = torch.full((capacity, f.row_bytes), GARBAGE, dtype=torch.uint8)
            want, cpp = got.clone(), got.clone()
            TORCH.pack(
                got, x, routed.lane_rows, routed.round_starts[round_idx], scales=s,
                topk_idx=None if cached else idx, topk_weights=weights if with_weights else None, lane=lane,
                first_token=first, last_token=last, scales_at=f.scales_at, token_at=f.token_at, ids_at=f.ids_at,
                weights_at=f.weights_at,
            )  # fmt: skip
            n = 0
            for t in range(first, last):
                if routed.lane_rows[t, lane] < 0:
                    continue
                write = [(0, x[t])] + ([(f.scales_at, s[t])] if s is not None else [])
                if not cached:
                    token = torch.tensor([t], dtype=torch.int32)
                    write += [(f.token_at, token), (f.ids_at, idx[t].int())]
                if with_weights:
                    write += [(f.weights_at, weights[t])]
                for at, values in write:
                    raw = bits(values).view(torch.uint8)
                    want[n, at : at + len(raw)] = raw
                strides = (0, 0, 0, 1)
                if s is not None:
                    item = s.element_size()
                    strides = (s.data_ptr(), s.stride(0) * item, s.stride(1) * item, item)
                _engine.rows.write_row(
                    cpp[n].data_ptr(), format_numbers, (x.data_ptr(), x.stride(0) * x.element_size()), strides,
                    0 if cached else idx.data_ptr(), weights.data_ptr() if with_weights else 0, t,
                )  # fmt: skip
                n += 1
            assert torch.equal(got, want) and torch.equal(got, cpp)
            starts = routed.round_starts[round_idx : round_idx + 2, lane]
            assert n == starts[1] - starts[0]
            packed += n
    assert packed == int(routed.lane_counts.sum()) > 0


# --- forward ---------------------------------------------------------------------------------------


def rows_with_ids(ids, tokens, f, seed=0):
    """[n, row_bytes] uint8: random bytes with these ids and tokens in their place."""
    rows = random_bytes(len(ids), f.row_bytes, seed)
    if len(rows) == 0:
        return rows
    rows[:, f.token_at : f.token_at + 4] = tokens.int()[:, None].view(torch.uint8)
    rows[:, f.ids_at : f.ids_at + 4 * f.topk] = ids.int().view(torch.uint8)
    if f.weights_at:
        weights = torch.rand(ids.shape).view(torch.uint8)
        rows[:, f.weights_at : f.weights_at + 4 * f.topk] = weights
    return rows


@pytest.mark.parametrize("num_tokens", [0, 1, 19])
def test_forward(num_tokens):
    """The second node of three, two ranks each, interleaved; experts of all nodes in the rows."""
    num_ranks, topk, num_experts = 6, 4, 14
    node_of, per_rank = [r % 3 for r in range(num_ranks)], -(-num_experts // num_ranks)
    here = [r for r in range(num_ranks) if node_of[r] == 1]
    local_of_rank = torch.tensor([here.index(r) if r in here else -1 for r in range(num_ranks)])
    f = RowFormat.of_dispatch(32, 0, topk, weights=True)
    ids = random_topk(num_tokens, topk, num_experts, seed=3)
    link = rows_with_ids(ids, torch.arange(num_tokens) * 2 + 5, f)
    starts = torch.tensor([3, 0], dtype=torch.int32)
    got = TORCH.forward_tables(
        link, local_of_rank.int(), starts, experts_per_rank=per_rank, topk=topk, token_at=f.token_at, ids_at=f.ids_at
    )  # fmt: skip
    assert got.tokens.tolist() == [5 + 2 * i for i in range(num_tokens)]
    next_row, sent = starts.tolist(), [[], []]
    want = []
    for i, row in enumerate(ids.tolist()):
        owners = {e // per_rank for e in row if e >= 0}
        want.append([-1, -1])
        for g, r in enumerate(here):
            if r in owners:
                want[-1][g] = next_row[g]
                next_row[g] += 1
                sent[g].append(i)
    assert got.rows.tolist() == want and got.rows.dtype == torch.int32
    for g in range(2):
        window = torch.full((num_tokens + 2, f.row_bytes), GARBAGE, dtype=torch.uint8)
        TORCH.forward(window, link, got.rows, starts, local=g)
        assert torch.equal(window[: len(sent[g])], link[torch.tensor(sent[g], dtype=torch.int64)])
        assert (window[len(sent[g]) :] == GARBAGE).all()


# --- unpack ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("weights", [True, False])
@pytest.mark.parametrize("num_tokens", [0, 1, 21])
def test_places_and_unpack(num_tokens, weights):
    """One source's rows in two rounds, every layout. Places of other sources stay untouched."""
    topk, first_expert, num_local = 3, 4, 5
    f = RowFormat.of_dispatch(48, 6, topk, weights=weights)
    ids = random_topk(num_tokens, topk, 12, seed=5)
    rows = rows_with_ids(ids, torch.arange(num_tokens), f)
    copies = torch.tensor([[7], [30], [2]]).expand(3, num_local)  # at least as many, by source
    first, sizes = TORCH.first_places(copies, alignment=8)
    assert sizes.tolist() == [40] * num_local  # 39 copies, aligned to 8
    assert first.tolist() == [[40 * e + before for e in range(num_local)] for before in (0, 7, 37)]
    padded, _ = TORCH.first_places(copies, capacity=50)
    assert padded[1].tolist() == [50 * e + 7 for e in range(num_local)]

    num_places = int(sizes.sum())
    out_x = torch.full((num_places, 24), -3, dtype=torch.int16)
    out_scales = torch.full((num_places, 6), GARBAGE, dtype=torch.uint8)
    out_ids, out_weights = torch.full((num_places,), -1), torch.zeros(num_places)
    want = [t.clone() for t in (out_x, out_scales, out_ids, out_weights)]
    by_rank = torch.full((num_tokens + 2, 24), -3, dtype=torch.int16)
    rank_ids = torch.full((num_tokens + 2, topk), -1)

    next_place = first[1].tolist()
    positions = []
    for i, row in enumerate(ids.tolist()):
        positions.append([-1] * topk)
        for k, e in enumerate(row):
            local = e - first_expert
            if not (e >= 0 and 0 <= local < num_local):
                continue
            place = positions[-1][k] = next_place[local]
            next_place[local] += 1
            want[0][place] = rows[i, :48].view(torch.int16)
            want[1][place] = rows[i, f.scales_at : f.scales_at + 6]
            want[2][place] = local
            if weights:
                want[3][place] = rows[i, f.weights_at :].view(torch.float32)[k]

    following = first[1]
    for part in (slice(0, 8), slice(8, num_tokens)):
        got = TORCH.places(
            rows[part], following, first_expert=first_expert, topk=topk, token_at=f.token_at, ids_at=f.ids_at,
            weights_at=f.weights_at,
        )  # fmt: skip
        following = got.next_places
        assert got.tokens.tolist() == list(range(num_tokens))[part]
        assert got.positions.tolist() == positions[part]
        TORCH.unpack(out_x, rows[part], got.positions, out_scales=out_scales, scales_at=f.scales_at)
        TORCH.unpack_lanes(out_ids, got.ids, got.positions)
        if weights:
            TORCH.unpack_lanes(out_weights, got.weights, got.positions)
            assert not got.weights[got.ids < 0].any()
        else:
            assert got.weights is None
        place = got.tokens[:, None] + 1
        TORCH.unpack(by_rank, rows[part], place)
        TORCH.unpack_lanes(rank_ids, got.ids, place)
    assert following.tolist() == next_place
    for a, b in zip((out_x, out_scales, out_ids, out_weights), want):
        assert torch.equal(a, b)
    assert torch.equal(by_rank[1:-1].view(torch.uint8), rows[:, :48])
    local = ids - first_expert
    mine = (ids >= 0) & (local >= 0) & (local < num_local)
    assert torch.equal(rank_ids[1:-1], torch.where(mine, local, -1))
    assert (by_rank[0] == -3).all() and (by_rank[-1] == -3).all()


# --- reduce ----------------------------------------------------------------------------------------


def make_terms(dtype, num_rows, width, num_terms, seed=0, none=0.4, scale=1.0):
    """(memory, offsets [n, J]): rows with gaps in one memory, any of them a term of any sum."""
    g = torch.Generator().manual_seed(seed)
    stride = width * dtype.itemsize + 48
    rows = (torch.randn(40, width, generator=g, dtype=torch.float64) * scale).to(dtype)
    memory = torch.full((16 + 40 * stride,), GARBAGE, dtype=torch.uint8)
    for i in range(40):
        at = 16 + i * stride
        memory[at : at + width * dtype.itemsize] = rows[i].view(torch.uint8)
    index = torch.randint(0, 40, (num_rows, num_terms), generator=g, dtype=torch.int32)
    index = torch.where(torch.rand(index.shape, generator=g) < none, -1, index)
    index[0], index[1, 1:] = -1, -1  # a sum without terms, and one with at most one
    offsets = TORCH.row_offsets(
        index, torch.zeros(num_terms, dtype=torch.int32), torch.full((num_terms,), 16), row_bytes=stride
    )  # fmt: skip
    return memory, offsets


def cpp_sum(out, memory, terms, bias):
    """One row. terms: (byte offset, weight or None)."""
    at = [(memory.data_ptr() + offset, weight) for offset, weight in terms]
    _engine.rows.sum_rows(
        out.data_ptr(), at, 0 if bias is None else bias.data_ptr(), len(out), DTYPE_CODES[out.dtype]
    )  # fmt: skip


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize(
    "width", [8, 520, 1032]
)  # less than, just over and twice the block of the C++ loop
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("biased", [False, True])
def test_reduce_is_the_cpp_sum(dtype, width, weighted, biased):
    g = torch.Generator().manual_seed(2)
    num_rows, num_terms = 25, 5
    memory, offsets = make_terms(dtype, num_rows, width, num_terms)
    weights = torch.randn(num_rows, num_terms, generator=g) if weighted else None
    bias = torch.randn(num_rows, width, generator=g).to(dtype) if biased else None
    wide = torch.full((num_rows, width + 8), 9.0, dtype=dtype)
    out = wide[:, :width]  # strided, as a window's rows are
    TORCH.reduce(out, memory, offsets, weights=weights, bias=bias)
    assert (wide[:, width:] == 9).all()
    counts = (offsets >= 0).sum(1).tolist()
    assert {0, 1, num_terms} < set(counts)
    for i in range(num_rows):
        want = torch.full((width,), 7.0, dtype=dtype)
        terms = [
            (int(offsets[i, j]), float(weights[i, j]) if weighted else None)
            for j in range(num_terms)
            if offsets[i, j] >= 0
        ]
        cpp_sum(want, memory, terms, bias[i] if biased else None)
        assert torch.equal(bits(out[i]), bits(want)), f"row {i} of {counts[i]} terms"


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_reduce_is_its_definition(dtype):
    """In 0-dim tensors, one operation at a time: product rounded, then added, in order, rounded once at the end."""
    exact = torch.float64 if dtype == torch.float64 else torch.float32
    num_rows, width, num_terms = 6, 4, 4
    memory, offsets = make_terms(dtype, num_rows, width, num_terms, seed=8)
    weights, bias = torch.randn(num_rows, num_terms), torch.randn(num_rows, width).to(dtype)
    for start, factors in ((None, None), (bias, None), (None, weights), (bias, weights)):
        out = torch.empty((num_rows, width), dtype=dtype)
        TORCH.reduce(out, memory, offsets, weights=factors, bias=start)
        for i in range(num_rows):
            for h in range(width):
                total = None if start is None else start[i, h].to(exact)
                for j in range(num_terms):
                    at = int(offsets[i, j]) + h * dtype.itemsize
                    if offsets[i, j] < 0:
                        continue
                    term = memory[at : at + dtype.itemsize].view(dtype)[0].to(exact)
                    if factors is not None:
                        term = term * factors[i, j].to(exact)
                    total = term if total is None else total + term
                total = torch.zeros((), dtype=exact) if total is None else total
                assert torch.equal(bits(out[i, h : h + 1]), bits(total.to(dtype)[None]))


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("inner", [(0, 2), (1, 4), (3, 5), (0, 5), (2, 3), (0, 0)])
def test_inner_terms_are_rounded_first(dtype, inner):
    """As the C++ source does: its own node's ranks into a row of their own, then that row among the nodes'."""
    num_rows, width, num_terms = 25, 24, 5
    memory, offsets = make_terms(dtype, num_rows, width, num_terms, seed=4)
    bias = torch.randn(num_rows, width).to(dtype)
    out = torch.empty((num_rows, width), dtype=dtype)
    TORCH.reduce(out, memory, offsets, bias=bias, inner_first=inner[0], inner_last=inner[1])
    differs = False
    for i in range(num_rows):
        node_sum = torch.empty(width, dtype=dtype)
        terms = []
        own = [(int(offsets[i, j]), None) for j in range(*inner) if offsets[i, j] >= 0]
        for j in range(num_terms):
            if j == inner[0] and own:
                cpp_sum(node_sum, memory, own, None)
                terms.append((node_sum.data_ptr() - memory.data_ptr(), None))
            if not inner[0] <= j < inner[1] and offsets[i, j] >= 0:
                terms.append((int(offsets[i, j]), None))
        want, flat = torch.empty(width, dtype=dtype), torch.empty(width, dtype=dtype)
        cpp_sum(want, memory, terms, bias[i])
        assert torch.equal(bits(out[i]), bits(want))
        cpp_sum(flat, memory, [(int(o), None) for o in offsets[i] if o >= 0], bias[i])
        differs |= not torch.equal(flat, want)
    assert differs or inner in ((0, 0), (2, 3)), "the levels must be seen in the bits"


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_a_single_term_passes_bit_for_bit(dtype):
    """−0.0, NaNs with their payload, infinities: with one plain term nothing is computed, in the inner sum, too."""
    pattern = torch.arange(2**16, dtype=torch.int32).to(torch.int16)
    values = pattern.repeat_interleave(dtype.itemsize // 2).view(dtype)  # 65 536 values
    memory = values.view(torch.uint8)
    offsets = torch.tensor([[-1, 0, -1]])
    for inner in ((0, 0), (0, 2)):
        out = torch.empty((1, len(values)), dtype=dtype)
        TORCH.reduce(out, memory, offsets, inner_first=inner[0], inner_last=inner[1])
        assert torch.equal(bits(out[0]), bits(values))
    cpp = torch.empty_like(values)
    cpp_sum(cpp, memory, [(0, None)], None)
    assert torch.equal(bits(cpp), bits(values))


@pytest.mark.parametrize("dtype", FLOATS[:3], ids=str)
def test_rounding_of_every_kind_of_number(dtype):
    """Every 16-bit pattern times weights, and plus a neighbour: subnormals, overflow, ties. NaN where C++ has NaN."""
    patterns = torch.arange(2**16, dtype=torch.int32).to(torch.int16)
    values = (
        patterns.view(dtype)
        if dtype != torch.float32
        else patterns.repeat_interleave(2).view(dtype)
    )
    memory = torch.cat([values, values.flip(0)]).view(torch.uint8)
    offsets = torch.tensor([[0, len(values) * dtype.itemsize]])
    for weights in (None, (0.333, 1.7), (1e-3, 1e-6), (-2.5, 3e4)):
        out = torch.empty((1, len(values)), dtype=dtype)
        TORCH.reduce(
            out, memory, offsets, weights=None if weights is None else torch.tensor([weights])
        )
        want = torch.empty_like(values)
        factors = (
            torch.tensor(weights).tolist() if weights else (None, None)
        )  # float32, as kernels have them
        cpp_sum(want, memory, list(zip(offsets[0].tolist(), factors)), None)
        nan = want.isnan()
        assert torch.equal(out[0].isnan(), nan)
        assert torch.equal(bits(out[0])[~nan], bits(want)[~nan])


@pytest.mark.parametrize("num_columns", [1, 8])
def test_columns_are_float32_sums(num_columns):
    """csrc's sum_columns is the kernel for rows, with dtype float32."""
    num_rows, num_terms = 30, 4
    memory, offsets = make_terms(torch.float32, num_rows, num_columns, num_terms, seed=6)
    out = torch.empty((num_rows, num_columns))
    TORCH.reduce(out, memory, offsets)
    for i in range(num_rows):
        want = torch.full((num_columns,), 7.0)
        terms = [memory.data_ptr() + int(o) for o in offsets[i] if o >= 0]
        _engine.rows.sum_columns(want.data_ptr(), terms, num_columns)
        assert torch.equal(bits(out[i]), bits(want))


def test_lane_columns():
    positions = torch.tensor([[3, -1, 0], [-1, -1, 2]], dtype=torch.int32)
    columns = torch.tensor([1.5, 2.5, 3.5, 4.5])
    assert TORCH.lane_columns(columns, positions).tolist() == [[4.5, 0.0, 1.5], [0.0, 0.0, 3.5]]
    assert TORCH.lane_columns(columns[:0], positions[:0]).shape == (0, 3)


def test_reduce_without_any_row():
    """No token; tokens without terms; a memory that is empty."""
    none = torch.empty(0, dtype=torch.uint8)
    out = torch.empty((0, 16))
    TORCH.reduce(out, none, torch.empty((0, 3), dtype=torch.int64))
    out = torch.full((2, 16), 5.0)
    TORCH.reduce(out, none, torch.full((2, 3), -1))
    assert not out.any()
    bias = torch.randn(2, 16)
    TORCH.reduce(out, none, torch.full((2, 3), -1), bias=bias)
    assert torch.equal(out, bias)


# --- the choice ------------------------------------------------------------------------------------


def test_kernels_are_chosen_by_device():
    assert for_device("cpu") is TORCH and for_device(torch.device("cpu")).name == "torch"
    assert all(
        step.__name__ == f"{name}_torch" for name, step in TORCH._asdict().items() if name != "name"
    )
    assert for_device("cuda:1") is TRITON and TRITON.name == "triton"
    own = {"name", "first_places"}  # a few numbers: the twin does for both
    assert all(
        step.__name__ == f"{name}_triton"
        for name, step in TRITON._asdict().items()
        if name not in own
    )
    with pytest.raises(NotImplementedError, match="expected cpu or cuda, got meta"):
        for_device(torch.device("meta"))


def test_the_choice_can_be_forced(monkeypatch):
    monkeypatch.setenv("MOE_COMM_KERNELS", "torch")
    assert for_device("cuda") is TORCH
    monkeypatch.setenv("MOE_COMM_KERNELS", "triton")
    assert for_device("cpu") is TRITON
    monkeypatch.setenv("MOE_COMM_KERNELS", "vulkan")
    with pytest.raises(
        ValueError, match="MOE_COMM_KERNELS: expected torch or triton or cuda, got 'vulkan'"
    ):
        for_device("cuda")


def test_triton_steps_have_their_twins_signatures():
    for name, step in TRITON._asdict().items():
        if name != "name":
            assert inspect.signature(step) == inspect.signature(getattr(TORCH, name)), name


def test_without_triton_its_kernels_say_so():
    code = (
        "import sys; sys.modules['triton'] = None\n"
        "import torch; from moe_comm.kernels import TORCH, TRITON\n"
        "TORCH.lane_columns(torch.zeros(3), torch.zeros(1, 2, dtype=torch.int32))\n"
        "TRITON.lane_columns(torch.zeros(3), torch.zeros(1, 2, dtype=torch.int32))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=dict(os.environ)
    )
    assert "ImportError: gather_columns: expected Triton to be installed" in done.stderr, (
        done.stderr
    )
