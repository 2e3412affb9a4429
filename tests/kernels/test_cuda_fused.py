"""The fused kernels as host code (fused_host.cpp), against the torch twins: windows byte for byte, and commands."""

import ctypes
import random

import pytest
import torch
from test_kernels import FLOATS, bits, lanes_of, make_terms, random_bytes, random_topk

from moe_comm.kernels import TORCH
from moe_comm.kernels.fused import Combine, DeviceRing, Forward, Group, Release, Send, Unpack
from moe_comm.layout import DTYPE_CODES, RowFormat


class Words:
    """Numbers in memory, by address; kept alive."""

    def __init__(self, values, dtype=torch.int64):
        self.tensor = torch.tensor(values, dtype=dtype)
        self.at = self.tensor.data_ptr()


def new_ring(num_slots, timeout_s=10.0):
    ticket = 2 * num_slots  # an even lap: zeroed slots are not there yet
    words = [Words([0] * 2 * num_slots), *(Words([ticket]) for _ in range(3)), Words([0])]
    return DeviceRing(*(w.at for w in words), num_slots, int(timeout_s * 1e9)), words


def take_all(library, ring):
    """{(channel, epoch, local offset, remote offset, bytes)}."""
    commands, command = [], (ctypes.c_uint64 * 5)()
    while library.take(ctypes.byref(ring), command) & 1:
        commands.append(tuple(command))
    assert len(set(commands)) == len(commands)
    return set(commands)


@pytest.mark.parametrize("num_blocks, num_threads", [(1, 1), (3, 4), (7, 2)])
@pytest.mark.parametrize("parts", ["ids and weights", "ids and scales", "cached"])
@pytest.mark.parametrize("capacity", [100, 6])
def test_send(library, num_blocks, num_threads, parts, capacity):
    num_tokens, hidden, topk, num_experts, epoch = 19, 40, 3, 16, 0x12345
    x = random_bytes(num_tokens, 4 * hidden, seed=1).view(torch.int16)[:, :hidden]  # rows with gaps
    scales = random_bytes(num_tokens, 4 * 5, seed=2).view(torch.float32).t().contiguous().t()
    idx, weights = random_topk(num_tokens, topk, num_experts), torch.rand(num_tokens, topk)
    cached, with_scales, with_weights = (
        parts == "cached",
        parts != "ids and weights",
        parts == "ids and weights",
    )
    f = RowFormat.of_dispatch(
        2 * hidden, 20 if with_scales else 0, topk, weights=with_weights, cached=cached
    )
    lane_of_rank, num_lanes = lanes_of(8, 2, node=1)
    routed = TORCH.route(
        idx, torch.tensor(lane_of_rank, dtype=torch.int32), num_experts=num_experts, num_ranks=8, num_lanes=num_lanes,
        capacity=capacity,
    )  # fmt: skip
    links, local = [2, 4, 5], [0, 1]  # lane 3 is the own node's: nobody's window
    lanes = Words(links + local, torch.int32)
    random.seed(7)
    for round_idx in range(len(routed.round_starts) - 1):
        first, last = round_idx * capacity, min(num_tokens, (round_idx + 1) * capacity)
        want = [
            torch.full((capacity, f.row_bytes), 0xA5, dtype=torch.uint8) for _ in range(num_lanes)
        ]
        got = [window.clone() for window in want]
        for lane in links + local:
            TORCH.pack(
                want[lane], x, routed.lane_rows, routed.round_starts[round_idx], scales=scales if with_scales else None,
                topk_idx=None if cached else idx, topk_weights=weights if with_weights else None, lane=lane,
                first_token=first, last_token=last, scales_at=f.scales_at, token_at=f.token_at, ids_at=f.ids_at,
                weights_at=f.weights_at,
            )  # fmt: skip
        heads = [512 if lane in links else 256 for lane in range(num_lanes)]
        windows = Words([w.data_ptr() - head for w, head in zip(got, heads, strict=True)])
        number = Words([epoch])
        link_words = Words([[10 + lane, 0, lane << 4, lane << 8] for lane in links])
        commit_words = Words([0, 0])
        commits = Words([commit_words.at, commit_words.at + 8])
        arrived, status = Words([0, 0]), Words([0])
        ring, kept = new_ring(4)
        arguments = Send(
            x.data_ptr(), 2 * x.stride(0), 2 * hidden, scales.data_ptr() if with_scales else 0, 4 * scales.stride(0),
            4 * scales.stride(1), 4, 5, 0 if cached else idx.data_ptr(), weights.data_ptr() if with_weights else 0,
            topk, routed.lane_rows.data_ptr(), routed.round_starts[round_idx].data_ptr(), num_lanes, first, last,
            f.scales_at, f.token_at, f.ids_at, f.weights_at, f.row_bytes, windows.at, 256, 512, lanes.at, len(links),
            len(local), link_words.at, commits.at, number.at, arrived.at, status.at, ring,
        )  # fmt: skip
        library.dispatch_send(ctypes.byref(arguments), num_blocks, num_threads)
        for lane in range(num_lanes):
            assert torch.equal(want[lane], got[lane]), f"lane {lane} of round {round_idx}"
        assert commit_words.tensor.tolist() == [epoch, epoch]
        assert status.tensor.tolist() == [0] and arrived.tensor.tolist() == [0, 0]
        starts = routed.round_starts[round_idx : round_idx + 2].tolist()
        assert take_all(library, arguments.ring) == {
            (10 + lane, epoch & 0xFFFF, lane << 4, lane << 8, 512 + f.row_bytes * (starts[1][lane] - starts[0][lane]))
            for lane in links
        }  # fmt: skip
        assert kept


def test_a_full_ring_is_reported_and_the_node_still_gets_its_rows(library):
    """No room and nobody takes: bounded, in the status word; the kernel ends normally."""
    x, rows = torch.zeros(1, 8, dtype=torch.int16), torch.zeros(1, 4, dtype=torch.int32)
    window = torch.full((4, 16), 7, dtype=torch.uint8)
    windows, links = Words([window[i].data_ptr() for i in range(4)]), Words([[1, 0, 0, 0]] * 3)
    commit, status, arrived = Words([0]), Words([0]), Words([0, 0])
    commits, lanes, starts = (
        Words([commit.at]),
        Words([0, 1, 2, 3], torch.int32),
        Words([0] * 8, torch.int32),
    )
    ring, kept = new_ring(2, timeout_s=0.01)
    number = Words([5])
    arguments = Send(
        x.data_ptr(), 16, 16, 0, 0, 0, 0, 0, 0, 0, 1, rows.data_ptr(), starts.at, 4, 0, 1, 0, 0, 0, 0, 16, windows.at,
        0, 0, lanes.at, 3, 1, links.at, commits.at, number.at, arrived.at, status.at, ring,
    )  # fmt: skip
    library.dispatch_send(ctypes.byref(arguments), 2, 4)
    assert status.tensor.tolist() == [1], "kWaitTimeout"
    assert not window.any() and commit.tensor.tolist() == [5] and kept


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize(
    "weighted, biased, inner", [(0, 0, (0, 0)), (1, 0, (0, 3)), (0, 1, (1, 4)), (1, 1, (3, 5))]
)
@pytest.mark.parametrize("num_blocks, num_threads", [(1, 1), (3, 2)])
def test_combine_send(library, dtype, weighted, biased, inner, num_blocks, num_threads):
    """Sums into windows of three groups, two for links, bit for bit what reduce's twin makes."""
    num_rows, width, num_terms, epoch = 21, 24, 5, 77
    memory, offsets = make_terms(dtype, num_rows, width, num_terms, seed=3)
    zeros = torch.zeros(width, dtype=dtype).neg().view(torch.uint8)
    memory = torch.cat([memory, zeros])  # a row of −0.0
    offsets[2:4] = -1
    offsets[2, 1] = offsets[3, 3] = offsets[3, 4] = len(memory) - len(zeros)
    if not weighted and not biased:  # one plain term: also a signalling NaN passes bit for bit
        nan = torch.full((width,), torch.inf, dtype=dtype)
        memory = torch.cat([memory, (bits(nan) + 1).view(torch.uint8)])
        offsets[4] = torch.tensor([-1, -1, len(memory) - len(zeros), -1, -1])
    weights = torch.rand(num_rows, num_terms) if weighted else None
    bias = torch.randn(num_rows, 2 * width).to(dtype)[:, :width] if biased else None
    want = torch.empty(num_rows, width, dtype=dtype)
    TORCH.reduce(
        want, memory, offsets, weights=weights, bias=bias, inner_first=inner[0], inner_last=inner[1]
    )
    item, row_bytes = dtype.itemsize, width * dtype.itemsize + 32
    window = torch.full((num_rows, row_bytes), 0xA5, dtype=torch.uint8)
    groups = Words(
        [[window[first].data_ptr(), row_bytes, first, n] for first, n in ((0, 4), (4, 0), (4, 17))]
    )
    links = Words([[7, 0, 16, 32], [8, 0, 48, 64]])
    commit, status, arrived = Words([0]), Words([0]), Words([0, 0])
    commits, number = Words([commit.at]), Words([epoch])
    ring, kept = new_ring(4)
    arguments = Combine(
        memory.data_ptr(), offsets.data_ptr(), weights.data_ptr() if weighted else 0, bias.data_ptr() if biased else 0,
        2 * width * item, num_terms, *inner, width * item, groups.at, 2, 1, links.at, 256, row_bytes, commits.at,
        number.at, arrived.at, status.at, ring,
    )  # fmt: skip
    library.combine_send(ctypes.byref(arguments), DTYPE_CODES[dtype], num_blocks, num_threads)
    got = window[:, : width * item].view(dtype)
    assert torch.equal(bits(got), bits(want)) and (window[:, width * item :] == 0xA5).all()
    assert commit.tensor.tolist() == [epoch] and status.tensor.tolist() == [0] and kept
    assert arrived.tensor.tolist() == [0, 0]
    assert take_all(library, arguments.ring) == {
        (7, 77, 16, 32, 256 + 4 * row_bytes),
        (8, 77, 48, 64, 256),
    }


@pytest.mark.parametrize("num_rows", [0, 1, 17])
@pytest.mark.parametrize("num_blocks, num_threads", [(1, 1), (4, 3)])
def test_forward(library, num_rows, num_blocks, num_threads):
    """Rows behind `num_rows` are not passed on, whatever the table says."""
    node_ranks, row_bytes, epoch = 3, 112, 9
    rows = random_bytes(num_rows + 4, row_bytes, seed=4)
    g = torch.Generator().manual_seed(num_rows)
    hits = torch.rand(num_rows + 4, node_ranks, generator=g) < 0.6
    starts = torch.tensor([5, 0, 40], dtype=torch.int32)
    table = torch.where(hits, hits.cumsum(0, dtype=torch.int32) - 1 + starts, -1)
    want = torch.full((node_ranks, num_rows + 1, row_bytes), 0xA5, dtype=torch.uint8)
    got = want.clone()
    for local in range(node_ranks):
        TORCH.forward(want[local], rows[:num_rows], table[:num_rows], starts, local=local)
    windows, told = Words([got[local].data_ptr() for local in range(node_ranks)]), Words([0, 0, 0])
    words, number, arrived = (
        Words([told.at + 8 * i for i in range(3)]),
        Words([num_rows], torch.int32),
        Words([0]),
    )
    newest, source = Words([epoch]), Words([rows.data_ptr()])
    release = Release(words=words.at, num_words=3, epoch=newest.at, arrived=arrived.at)
    arguments = Forward(
        sources=source.at, num_links=1, num_rows=number.at, row_bytes=row_bytes,
        table=table.data_ptr(), table_rows=len(table), node_ranks=node_ranks, starts=starts.data_ptr(),
        windows=windows.at, release=release,
    )  # fmt: skip
    library.forward(ctypes.byref(arguments), num_blocks, num_threads)
    assert torch.equal(got, want)
    assert told.tensor.tolist() == [epoch] * 3 and arrived.tensor.tolist() == [0]


@pytest.mark.parametrize(
    "rows_of, num_positions", [([0], 1), ([1], 3), ([17], 1), ([9, 0, 8], 4), ([3, 5], 0)]
)
@pytest.mark.parametrize("scale_bytes", [0, 7, 20])
@pytest.mark.parametrize("num_blocks, num_threads", [(1, 1), (4, 3)])
def test_unpack(library, rows_of, num_positions, scale_bytes, num_blocks, num_threads):
    """Windows of several sources at once; without positions rows keep their order. Then banks are free."""
    f = RowFormat.of_dispatch(80, scale_bytes, 2, weights=True)
    head, num_places, epoch, num_rows = 48, 90, 11, sum(rows_of)
    windows = [random_bytes(n + 3, f.row_bytes, seed=6 + s) for s, n in enumerate(rows_of)]
    rows = torch.cat([window[:n] for window, n in zip(windows, rows_of)])
    positions = torch.arange(num_rows, dtype=torch.int32)[:, None]
    if num_positions:
        places = torch.randperm(num_places, generator=torch.Generator().manual_seed(1)).int()
        positions = places[: num_rows * num_positions].view(num_rows, num_positions)
        positions = torch.where(positions % 4 == 0, -1, positions)
    x, scales = (
        torch.full((num_places, 40), -3, dtype=torch.int16),
        torch.ones(num_places, scale_bytes),
    )
    outs = [(x.clone(), scales.to(torch.uint8)) for _ in range(2)]
    TORCH.unpack(
        outs[0][0], rows, positions, out_scales=outs[0][1] if scale_bytes else None, scales_at=f.scales_at
    )  # fmt: skip
    told, counts, arrived, status = (
        Words([0, 0]),
        Words(rows_of, torch.int32),
        Words([0]),
        Words([0]),
    )
    starts = Words([sum(rows_of[:s]) for s in range(len(rows_of))], torch.int32)
    words, newest = Words([told.at, told.at + 8]), Words([epoch])
    links, at = Words([[3, 4, 0, 0], [5, 6, 0, 0]]), Words([w.data_ptr() - head for w in windows])
    ring, kept = new_ring(4)
    release = Release(words.at, 2, links.at, 2, newest.at, arrived.at, status.at, ring)
    arguments = Unpack(
        at.at, len(windows), head, counts.at, starts.at, f.row_bytes, 80, positions.data_ptr() if num_positions else 0,
        num_positions, outs[1][0].data_ptr(), outs[1][1].data_ptr() if scale_bytes else 0, f.scales_at, scale_bytes,
        release,
    )  # fmt: skip
    library.unpack(ctypes.byref(arguments), num_blocks, num_threads)
    assert torch.equal(outs[0][0], outs[1][0]) and torch.equal(outs[0][1], outs[1][1])
    assert (
        told.tensor.tolist() == [epoch] * 2
        and arrived.tensor.tolist() == [0] == status.tensor.tolist()
    )
    assert (
        take_all(library, arguments.release.ring) == {(4, epoch, 0, 0, 0), (6, epoch, 0, 0, 0)}
        and kept
    )


@pytest.mark.parametrize("num_columns", [1, 3, 8])
def test_columns(library, num_columns):
    """fp32 columns beside the rows: stored, then added in the order of the terms."""
    num_rows, width, at, row_bytes = 7, 8, 16, 48
    y = torch.randn(num_rows, width).bfloat16()
    columns = torch.randn(num_rows, num_columns)
    window = torch.full((num_rows, row_bytes), 0xA5, dtype=torch.uint8)
    offsets, newest, arrived = (
        (torch.arange(num_rows) * 16)[:, None].contiguous(),
        Words([4]),
        Words([0, 0]),
    )
    common = {"payload_bytes": 16, "num_local": 1, "epoch": newest.at, "arrived": arrived.at, "columns_at": at,
              "num_columns": num_columns}  # fmt: skip
    store = Combine(
        memory=y.data_ptr(), offsets=offsets.data_ptr(), num_terms=1, columns=columns.data_ptr(),
        whole=Group(window.data_ptr(), row_bytes, 0, num_rows), **common,
    )  # fmt: skip
    library.combine_send(ctypes.byref(store), 1, 2, 2)
    assert torch.equal(bits(window[:, :16].contiguous().view(torch.bfloat16)), bits(y))
    stored = window[:, at : at + 4 * num_columns].contiguous().view(torch.float32)
    assert (
        torch.equal(bits(stored), bits(columns))
        and (window[:, at + 4 * num_columns :] == 0xA5).all()
    )
    terms = torch.tensor([[0, 2, 5], [-1, 6, 1], [-1, -1, -1], [-1, 3, -1]])
    offsets = torch.where(terms >= 0, terms * row_bytes, -1)
    out, out_columns = (
        torch.zeros(4, width, dtype=torch.bfloat16),
        torch.full((4, num_columns), 7.0),
    )
    add = Combine(
        memory=window.data_ptr(), offsets=offsets.data_ptr(), num_terms=3, out_columns=out_columns.data_ptr(),
        whole=Group(out.data_ptr(), 16, 0, 4), **common,
    )  # fmt: skip
    library.combine_send(ctypes.byref(add), 1, 2, 2)
    c = columns
    want = torch.stack([(c[0] + c[2]) + c[5], c[6] + c[1], torch.zeros(num_columns), c[3]])
    assert torch.equal(bits(out_columns), bits(want))


def test_behind_a_wait_that_failed_kernels_do_nothing(library):
    """No row is packed, passed on, added or unpacked, nobody is told, nothing is pushed."""
    status, words, counts = Words([1]), Words([0]), Words([0, 0])
    x, rows = torch.full((1, 8), 5, dtype=torch.int16), torch.zeros(1, 1, dtype=torch.int32)
    window, n = torch.full((2, 16), 7, dtype=torch.uint8), Words([1], torch.int32)
    windows, tell, starts = (
        Words([window.data_ptr()] * 2),
        Words([words.at]),
        Words([0] * 2, torch.int32),
    )
    lanes, links, failed = Words([0, 0], torch.int32), Words([[1, 2, 0, 0]]), Words([0])
    ring, kept = new_ring(4)
    group = Words([[window.data_ptr(), 16, 0, 1]] * 2)
    newest = Words([5])
    common = {"epoch": newest.at, "arrived": counts.at}
    source = Words([x.data_ptr()])
    release = Release(
        words=tell.at,
        num_words=1,
        links=links.at,
        num_links=1,
        status=failed.at,
        ring=ring,
        **common,
    )
    structs = {
        "dispatch_send": Send(
            x=x.data_ptr(), x_stride=16, payload_bytes=16, lane_rows=rows.data_ptr(), starts=starts.at, num_lanes=1,
            last_token=1, row_bytes=16, windows=windows.at, lanes=lanes.at, num_links=1, num_local=1, links=links.at,
            commits=tell.at, status=failed.at, ring=ring, **common,
        ),
        "combine_send": Combine(
            memory=x.data_ptr(), offsets=Words([0]).at, num_terms=1, payload_bytes=16, groups=group.at, num_links=1,
            num_local=1, links=links.at, row_bytes=16, commits=tell.at, status=failed.at, ring=ring, **common,
        ),
        "forward": Forward(
            sources=source.at, num_links=1, num_rows=n.at, row_bytes=16, table=rows.data_ptr(), table_rows=1,
            node_ranks=1, starts=starts.at, windows=windows.at, release=release,
        ),
        "unpack": Unpack(
            windows=source.at, num_sources=1, num_rows=n.at, starts=starts.at, row_bytes=16,
            payload_bytes=16, positions=rows.data_ptr(), num_positions=1, out_x=window.data_ptr(), release=release,
        ),
    }  # fmt: skip
    offsets = torch.zeros(1, 1, dtype=torch.int64)
    structs["combine_send"].offsets = offsets.data_ptr()
    for name, struct in structs.items():
        more = (ctypes.c_uint64(1),) if name == "combine_send" else ()
        for waited, came in ((status, False), (Words([0]), True)):
            (struct if name.endswith("send") else struct.release).waited = waited.at
            getattr(library, name)(
                ctypes.byref(struct), *more, ctypes.c_uint64(2), ctypes.c_uint64(2)
            )
            assert (window[0] != 7).any().item() == came and words.tensor.item() == 5 * came, name
            assert counts.tensor.tolist() == [0, 0]
            pushed = take_all(library, ring)
            assert bool(pushed) == came, name
        window.fill_(7)
        words.tensor.zero_()
    assert kept and failed.tensor.item() == 0
