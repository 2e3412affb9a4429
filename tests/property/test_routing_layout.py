"""Properties of what both sides of an exchange compute by themselves: rows of tokens, parts of rows, places of windows,
numbers of nodes. If two ranks disagreed in one of these, bytes would land in the wrong place without any error."""

import itertools

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from moe_comm import _engine, errors
from moe_comm.group import Topology, _nodes_of
from moe_comm.kernels import TORCH
from moe_comm.layout import RowFormat, WindowLayout, counts_bytes

HOPS = st.sampled_from(["node", "rank"])
QUICK = settings(deadline=None, max_examples=60)


# --- rows of tokens --------------------------------------------------------------------------------


@st.composite
def routings(draw):
    """(topk_idx, E, R, nodes, hops, rank): any shape, skew and share of -1."""
    node_ranks, num_nodes = draw(st.integers(1, 4)), draw(st.integers(1, 4))
    num_ranks = node_ranks * num_nodes
    num_experts = draw(st.integers(1, 40))
    num_tokens, topk = draw(st.integers(0, 30)), draw(st.integers(1, min(8, num_experts)))
    g = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    scores = torch.rand(num_tokens, num_experts, generator=g)
    scores[:, 0] *= draw(st.sampled_from([1.0, 0.0, 2.0]))  # a hot expert, a cold one, or neither
    idx = scores.argsort(1)[:, :topk]
    none = draw(st.sampled_from([0, 0.3, 1]))
    idx = torch.where(torch.rand(idx.shape, generator=g) < none, -1, idx).contiguous()
    order = draw(st.permutations(range(num_ranks)))
    nodes = [order[i : i + node_ranks] for i in range(0, num_ranks, node_ranks)]
    rank = draw(st.integers(0, num_ranks - 1))
    return idx, num_experts, num_ranks, nodes, draw(HOPS), rank


def lanes_of(topology, hops):
    """As csrc/exchange.cpp numbers them: lane_of_rank and D."""
    t = topology
    if hops == "rank":
        return list(range(t.num_ranks)), t.num_ranks
    ranks = range(t.num_ranks)
    lanes = [t.local_of[r] if t.is_local(r) else t.node_ranks + t.node_of[r] for r in ranks]
    return lanes, t.node_ranks + t.num_nodes


def route_cpp(idx, num_experts, num_ranks, lanes, num_lanes):
    rows = torch.empty((len(idx), num_lanes), dtype=torch.int32)
    error, *counts = _engine.rows.route(
        idx.data_ptr(), *idx.shape, num_experts, lanes, num_lanes, rows.data_ptr()
    )
    assert not error
    return rows, *counts


def route_torch(idx, num_experts, num_ranks, lanes, num_lanes):
    got = TORCH.route(
        idx, torch.tensor(lanes, dtype=torch.int32), num_experts=num_experts, num_ranks=num_ranks,
        num_lanes=num_lanes, capacity=4,
    )  # fmt: skip
    counts = (got.lane_counts, got.rank_counts, got.expert_counts)
    return got.lane_rows, *(t.tolist() for t in counts)


@pytest.mark.parametrize("route", [route_cpp, route_torch])
@QUICK
@given(routings())
def test_route_by_closed_forms(route, routing):
    idx, num_experts, num_ranks, nodes, hops, rank = routing
    topology = Topology.from_nodes(rank, nodes)
    lanes, num_lanes = lanes_of(topology, hops)
    routed = route(idx, num_experts, num_ranks, lanes, num_lanes)
    rows, lane_counts, rank_counts, expert_counts = routed
    experts_per_rank = -(-num_experts // num_ranks)
    assert len(expert_counts) == num_ranks * experts_per_rank
    assert expert_counts[:num_experts] == [int((idx == e).sum()) for e in range(num_experts)]
    assert not any(expert_counts[num_experts:])  # the last ranks own fewer, or none
    owner = torch.where(idx >= 0, idx // experts_per_rank, -1)
    # [T, R]: once, however many experts of that rank
    to_rank = torch.stack([(owner == r).any(1) for r in range(num_ranks)], 1)
    assert rank_counts == to_rank.sum(0).tolist()
    for lane in range(num_lanes):
        ranks = [r for r in range(num_ranks) if lanes[r] == lane]
        token = to_rank[:, ranks].any(1)  # one row for a node, however many of its ranks want it
        assert (rows[:, lane] >= 0).tolist() == token.tolist()
        # dense, ascending with the token
        assert rows[token, lane].tolist() == list(range(lane_counts[lane]))
        assert max([rank_counts[r] for r in ranks], default=0) <= lane_counts[lane]
        assert lane_counts[lane] <= min(len(idx), sum(rank_counts[r] for r in ranks))


@QUICK
@given(routings(), st.integers(1, 35))
def test_rounds_split_every_lane(routing, capacity):
    """A round has the rows of its C tokens, so at most C in any lane, and the rounds have all of them."""
    idx, num_experts, num_ranks, nodes, hops, rank = routing
    lanes, num_lanes = lanes_of(Topology.from_nodes(rank, nodes), hops)
    rows, lane_counts, _, _ = route_cpp(idx, num_experts, num_ranks, lanes, num_lanes)
    starts = TORCH.round_starts(rows, capacity=capacity)
    assert len(starts) - 1 == max(1, -(-len(idx) // capacity))
    assert not starts[0].any() and starts[-1].tolist() == lane_counts
    for i, part in enumerate(rows.split(capacity)):
        for lane in range(num_lanes):
            of_round = part[part[:, lane] >= 0, lane].tolist()
            assert of_round == list(range(int(starts[i, lane]), int(starts[i + 1, lane])))


# --- parts of rows ---------------------------------------------------------------------------------

PAYLOADS = st.integers(1, 2000).map(lambda n: 16 * n)


@QUICK
@given(PAYLOADS, st.integers(0, 300), st.integers(1, 40), st.booleans(), st.booleans())
def test_parts_of_a_dispatch_row(payload, scales, topk, weights, cached):
    f = RowFormat.of_dispatch(payload, scales, topk, weights=weights, cached=cached)
    parts = [(0, payload), (f.scales_at, scales)]
    if not cached:
        parts += [(f.token_at, 4), (f.ids_at, 4 * topk)] + [(f.weights_at, 4 * topk)] * weights
        assert f.token_at % 4 == f.ids_at % 4 == f.weights_at % 4 == 0
        assert bool(f.weights_at) == weights
    assert f.scales_at % 16 == 0  # scales of any item size
    check_parts(f, parts)


@QUICK
@given(PAYLOADS, st.integers(1, 40), st.booleans())
def test_parts_of_a_combine_row(payload, topk, columns):
    f = RowFormat.of_combine(payload, topk, columns=columns)
    assert f.weights_at % 4 == 0 and bool(f.weights_at) == columns
    check_parts(f, [(0, payload)] + [(f.weights_at, 4 * topk)] * columns)
    # Windows made for the dispatch's rows hold as many of the combine's.
    assert f.row_bytes <= RowFormat.of_dispatch(payload, 0, topk, weights=True).row_bytes


def check_parts(f, parts):
    end = 0
    for at, num_bytes in parts:  # in this order, no two overlap
        assert end <= at
        end = at + num_bytes
    assert end <= f.row_bytes < end + 16 and f.row_bytes % 16 == 0


# --- places of windows -----------------------------------------------------------------------------


@st.composite
def layouts(draw):
    node_ranks, num_nodes = draw(st.integers(1, 8)), draw(st.integers(1, 8))
    return WindowLayout.for_rows(
        node_ranks * num_nodes, num_nodes, draw(HOPS), capacity=draw(st.integers(1, 300)),
        row_bytes=16 * draw(st.integers(1, 1000)), num_experts=draw(st.integers(1, 400)),
    )  # fmt: skip


def num_links_and_sends(layout):
    if layout.hops == "node":
        return layout.num_nodes - 1, layout.num_nodes - 1
    return 0, layout.num_ranks - layout.node_ranks


@QUICK
@given(layouts())
def test_regions_never_overlap(layout):
    R, N = layout.num_ranks, layout.num_nodes
    links, sends = num_links_and_sends(layout)
    far = 0 if layout.hops == "node" else R - layout.node_ranks
    control = [
        ("beats", 16 * R), ("commits", 8 * 2 * (R + N)), ("releases", 8 * 2 * R), ("sents", 8 * 2 * R),
        ("masks", 8 * R), ("told", 8 * R),
    ]  # fmt: skip
    near = [("slots", 2 * (R - far) * layout.stride)]
    by_network = [
        ("far_slots", 2 * far * layout.stride), ("links", 2 * links * layout.stride),
        ("sends", 2 * sends * layout.stride),
    ]  # fmt: skip
    for apart, segment, own in (
        ("", control + near + by_network, []), ("near", control + by_network, near), ("all", control, near + by_network)
    ):  # fmt: skip
        at = layout.offsets(apart)
        for regions, end, total in ((segment, 128, at["segment"]), (own, 0, at["apart"])):
            for (
                name,
                num_bytes,
            ) in regions:  # the doorbell and the own heartbeat lie before the first
                assert end <= at[name] and at[name] % 64 == 0
                end = at[name] + num_bytes
            assert end == total or (total == at["segment"] and 0 <= total - end < 4096)
        assert at["stride"] == layout.stride and layout.stride % 64 == 0 and at["slots"] % 4096 == 0
    assert layout.offsets()["segment"] == layout.total_bytes


@QUICK
@given(layouts())
def test_window_bytes_is_the_formula(layout):
    R, N, G = layout.num_ranks, layout.num_nodes, layout.node_ranks
    C, row = layout.capacity, layout.row_bytes
    formula = 2 * (R + 2 * (N - 1)) if layout.hops == "node" else 2 * (2 * R - G)
    assert layout.window_bytes == formula * C * row
    links, sends = num_links_and_sends(layout)
    assert layout.num_windows == 2 * (R + links + sends)
    assert layout.stride > 256 + C * row
    # what comes on top: headers, counts and control words
    assert layout.total_bytes - layout.num_windows * layout.stride < 4096 + 64 * 5 + 16 * 5 * R


@QUICK
@given(layouts(), PAYLOADS, st.integers(0, 100).map(lambda n: 16 * n))
def test_capacity_for_fills_the_window(layout, row_bytes, counts):
    if layout.stride < 256 + counts + row_bytes:
        with pytest.raises(errors.ArgumentError, match="window_bytes"):
            layout.capacity_for(row_bytes, counts)
        return
    capacity = layout.capacity_for(row_bytes, counts)
    left = layout.stride - 256 - counts - capacity * row_bytes
    assert 0 <= left < row_bytes


@QUICK
@given(st.integers(1, 8), st.integers(1, 8), HOPS, PAYLOADS, st.integers(0, 10**9))
def test_budget_gives_the_largest_capacity(node_ranks, num_nodes, hops, payload, budget):
    row_bytes = RowFormat.of_dispatch(payload, 0, 8, weights=True).row_bytes
    num_ranks, num_experts = node_ranks * num_nodes, 100
    layout = WindowLayout.for_budget(
        num_ranks,
        num_nodes,
        hops,
        window_bytes=budget,
        row_bytes=row_bytes,
        num_experts=num_experts,
    )
    assert layout.window_bytes <= budget or layout.capacity == 1
    assert layout.window_bytes + layout.num_windows * row_bytes > budget
    counts = counts_bytes(num_experts, num_ranks, node_ranks, by_node=hops == "node")
    assert layout.capacity_for(row_bytes, counts) >= layout.capacity  # the promise is kept


@pytest.mark.parametrize("hops", ["node", "rank"])
@pytest.mark.parametrize("num_experts", [256, 384])
def test_large_groups_take_less_than_a_gigabyte(hops, num_experts):
    """T = 4096, R = 64, G = 8, H = 7168, bf16, K = 8: T runs in rounds, memory does not follow it."""
    row = RowFormat.of_dispatch(7168 * 2, 0, 8, weights=True)
    budget = {"window_bytes": 512 * 10**6, "row_bytes": row.row_bytes, "num_experts": num_experts}
    layout = WindowLayout.for_budget(64, 8, hops, **budget)
    assert 0.9 * 512e6 < layout.window_bytes <= 512e6
    assert layout.total_bytes < 1e9
    if hops == "node":
        known = WindowLayout.for_rows(
            64, 8, hops, capacity=256, row_bytes=row.row_bytes, num_experts=num_experts
        )
        assert known.window_bytes == 2 * (64 + 2 * 7) * 256 * row.row_bytes
        assert 0.57e9 < known.window_bytes < 0.59e9 and known.total_bytes < 1e9


@st.composite
def groups(draw):
    """(layout, topologies of all ranks)."""
    node_ranks, num_nodes = draw(st.integers(1, 4)), draw(st.integers(1, 5))
    order = draw(st.permutations(range(node_ranks * num_nodes)))
    nodes = [order[i : i + node_ranks] for i in range(0, len(order), node_ranks)]
    layout = WindowLayout.for_rows(
        len(order),
        num_nodes,
        draw(HOPS),
        capacity=3,
        row_bytes=48,
        num_experts=draw(st.integers(1, 40)),
    )
    return layout, [Topology.from_nodes(r, nodes) for r in range(len(order))]


def link_index(node, mine):
    return node if node < mine else node - 1


def far_index(layout, me, reader, rank):
    """Exchange::far_index."""
    return sum(me.node_of[r] != me.node_of[reader] for r in range(rank))


def writer_side(layout, me, peer, bank):
    """(window in the peer's segment, own send region) as Exchange::link_peer computes them."""
    at = layout.offsets()
    mine, theirs = me.node, me.node_of[peer]
    if layout.hops == "node":
        window = at["links"] + 2 * layout.stride * link_index(mine, theirs)
        send = at["sends"] + 2 * layout.stride * link_index(theirs, mine)
    else:
        window = at["far_slots"] + 2 * layout.stride * far_index(layout, me, peer, me.rank)
        send = at["sends"] + 2 * layout.stride * sum(not me.is_local(r) for r in range(peer))
    return window + layout.stride * bank, send + layout.stride * bank


def reader_side(layout, me, peer, bank):
    """Where `me` reads what `peer` wrote by the network: Exchange::link_window and Exchange::slot."""
    at = layout.offsets()
    if layout.hops == "node":
        return at["links"] + layout.stride * (2 * link_index(me.node_of[peer], me.node) + bank)
    return at["far_slots"] + layout.stride * (2 * far_index(layout, me, me.rank, peer) + bank)


@QUICK
@given(groups())
def test_both_sides_of_a_link_agree(group):
    """Writer and reader compute the same offset, and no window or send region has two users."""
    layout, at = group
    places = layout.offsets()
    links, sends = num_links_and_sends(layout)
    for me in at:
        peers = [r for r in range(me.num_ranks) if not me.is_local(r)]
        if layout.hops == "node":
            peers = [r for r in peers if me.local_of[r] == me.local_of[me.rank]]
        windows, regions = [], []
        for peer, bank in itertools.product(peers, (0, 1)):
            window, _ = writer_side(layout, at[peer], me.rank, bank)
            assert window == reader_side(layout, me, peer, bank)
            _, send = writer_side(layout, me, peer, bank)
            windows.append(window)
            regions.append(send)
        assert len(set(windows)) == len(windows) == 2 * (links if layout.hops == "node" else sends)
        region = ("links", "sends") if links else ("far_slots", "links")
        first, last = (places[name] for name in region)
        assert all(first <= w and w + layout.stride <= last for w in windows)
        all_regions = range(places["sends"], places["segment"], layout.stride)
        assert sorted(regions) == list(all_regions) and len(all_regions) == 2 * sends


@QUICK
@given(groups())
def test_every_slot_has_one_writer(group):
    """hops="node": a dispatch's rows of a source and a combine's results for it come into a slot from the same rank of
    the reader's node. hops="rank": from the slot's own rank."""
    layout, at = group
    assume(layout.hops == "node")
    for reader in at:
        G = reader.node_ranks
        own_node = reader.rank_of[reader.node * G : (reader.node + 1) * G]
        by_dispatch = {  # source -> who stores its rows: itself, or its forwarder
            source: source if reader.is_local(source) else own_node[reader.local_of[source]]
            for source in range(reader.num_ranks)
        }
        by_combine = {}  # slot -> who stores results for the source (node, my local)
        for writer in own_node:
            for node in range(reader.num_nodes):
                slot = reader.rank_of[node * G + at[writer].local_of[writer]]
                assert slot not in by_combine
                by_combine[slot] = writer
        assert by_combine == by_dispatch


# --- numbers of nodes ------------------------------------------------------------------------------


@st.composite
def partitions(draw):
    """Ranks 0…R-1 in disjoint lists, in any order."""
    num_ranks = draw(st.integers(1, 16))
    label = draw(st.lists(st.integers(0, 5), min_size=num_ranks, max_size=num_ranks))
    nodes = [[r for r in range(num_ranks) if label[r] == n] for n in range(6)]
    return draw(st.permutations([draw(st.permutations(node)) for node in nodes if node]))


@QUICK
@given(partitions(), st.data())
def test_topology_from_nodes(nodes, data):
    num_ranks = sum(map(len, nodes))
    rank = data.draw(st.integers(0, num_ranks - 1))
    t = Topology.from_nodes(rank, nodes)
    assert (t.rank, t.num_ranks, t.num_nodes * t.node_ranks) == (rank, num_ranks, num_ranks)
    if len({len(node) for node in nodes}) > 1:  # unequal nodes
        assert t.node_ranks == 1 and t.node_of == tuple(range(num_ranks))
    else:
        assert t.node_ranks == len(nodes[0])
        assert {frozenset(node) for node in nodes} == {
            frozenset(r for r in range(num_ranks) if t.node_of[r] == n) for n in range(t.num_nodes)
        }
    lowest = [min(r for r in range(num_ranks) if t.node_of[r] == n) for n in range(t.num_nodes)]
    assert lowest == sorted(lowest)  # nodes are numbered by their lowest rank
    assert sorted(t.rank_of) == list(range(num_ranks))
    for r in range(num_ranks):
        assert t.rank_of[t.node_of[r] * t.node_ranks + t.local_of[r]] == r
        below = [o for o in range(r) if t.node_of[o] == t.node_of[r]]
        assert t.local_of[r] == len(below)  # ranks of a node ascend
        assert t.is_local(r) == (t.node_of[r] == t.node_of[rank])
    assert t.node == t.node_of[rank]


def test_interleaved_ranks():
    t = Topology.from_nodes(3, [[5, 3, 1], [4, 0, 2]])
    assert t.node_of == (0, 1, 0, 1, 0, 1)
    assert t.local_of == (0, 0, 1, 1, 2, 2)
    assert t.rank_of == (0, 2, 4, 1, 3, 5)


@QUICK
@given(partitions())
def test_nodes_are_found_by_reach(nodes):
    """Who can map whom, as an equivalence: exactly its classes, by lowest rank, whatever the order of ranks."""
    num_ranks = sum(map(len, nodes))
    node_of = {r: n for n, node in enumerate(nodes) for r in node}
    can = [[node_of[a] == node_of[b] for b in range(num_ranks)] for a in range(num_ranks)]
    assert _nodes_of(can) == sorted(sorted(node) for node in nodes)


@QUICK
@given(partitions(), st.data())
def test_reach_that_is_no_equivalence_gives_single_ranks(nodes, data):
    """One direction of one pair fails: then it does not count, and its ranks' classes are no classes any more."""
    num_ranks = sum(map(len, nodes))
    node = data.draw(st.sampled_from(nodes))
    assume(len(node) >= 3)
    node_of = {r: n for n, ranks in enumerate(nodes) for r in ranks}
    can = [[node_of[a] == node_of[b] for b in range(num_ranks)] for a in range(num_ranks)]
    a, b = data.draw(st.permutations(node))[:2]
    can[a][b] = False
    assert _nodes_of(can) == [[r] for r in range(num_ranks)]


def test_reach_in_one_direction_is_none():
    assert _nodes_of([[True, True], [False, True]]) == [[0], [1]]
    two_nodes = [[True, False, True], [False, True, False], [True, False, True]]
    assert _nodes_of(two_nodes) == [[0, 2], [1]]
    assert _nodes_of([[True]]) == [[0]]
