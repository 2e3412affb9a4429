"""A rank whose GPU is threads of the host: dispatch and combine with hops="rank" by kernels/*.cuh alone.

    arm credits, wait ─ pack, store, push ─ arm rows, wait ─ unpack ─ push releases

Each line of it is a launch or a wait on "the stream" (this thread). The host computes tables from what all ranks know
of each other's routing; bytes travel by the engine's proxies. All is checked against the torch twins, bit for bit.
"""

import ctypes

import torch
from test_kernels import bits, random_topk

from moe_comm import _engine
from moe_comm.device_ring import DeviceRing
from moe_comm.kernels import TORCH, fused
from moe_comm.layout import DTYPE_CODES, RowFormat

SECRET, HEAD_BYTES, ROWS_AT = 0x5EC7E7, 256, 20  # csrc/abi.hpp: Header
HIDDEN, TOPK, EXPERTS, TOKENS = 40, 3, 16, 13
PAYLOAD = 2 * HIDDEN
STREAM_WAIT_S = 25.0


def run_on_host(library_path):
    """Launches of kernels and stream waits go to fused_host.cpp, in this process, from now on."""
    library = ctypes.CDLL(library_path)
    library.stream_wait.restype = ctypes.c_bool
    u64 = ctypes.c_uint64

    def run(kernel, arguments, num_blocks, num_threads, device):
        first = ctypes.byref(arguments[0])
        if kernel == "moe_comm_push":
            library.push(first, *arguments[1:], u64(num_blocks))
        elif kernel == "moe_comm_arm":
            library.arm(first, *arguments[1:])
        elif kernel.startswith("moe_comm_combine_send_"):
            dtype = {v: k for k, v in fused.DTYPES.items()}[kernel.rsplit("_", 1)[1]]
            library.combine_send(first, u64(DTYPE_CODES[dtype]), u64(3), u64(2))
        else:
            name = {"send": "dispatch_send"}.get(kernel.rsplit("_", 1)[1], kernel.rsplit("_", 1)[1])
            getattr(library, name)(first, u64(3), u64(2))

    def stream_wait(address, least, device):
        assert least == 1
        assert library.stream_wait(ctypes.c_void_p(address), ctypes.c_double(STREAM_WAIT_S)), (
            "an armed wait never ended"
        )

    fused.run, fused.stream_wait = run, stream_wait


def words(values, dtype=torch.int64):
    return torch.tensor(
        [v - (v >> 63 << 64) if dtype == torch.int64 else v for v in values], dtype=dtype
    )


class Source:
    """What rank `rank` sends at `epoch`, known to all."""

    def __init__(self, rank, num_ranks, epoch):
        seed = (rank * 1000 + epoch) % 2**31
        g = torch.Generator().manual_seed(seed)
        tokens = (TOKENS + seed) % (TOKENS + 1)  # sometimes none
        self.x = torch.randn(tokens, HIDDEN, generator=g).bfloat16()
        self.idx = random_topk(tokens, TOPK, EXPERTS, seed=seed)
        self.weights = torch.rand(tokens, TOPK, generator=g)
        self.routed = TORCH.route(
            self.idx, torch.arange(num_ranks, dtype=torch.int32), num_experts=EXPERTS, num_ranks=num_ranks,
            num_lanes=num_ranks, capacity=TOKENS,
        )  # fmt: skip
        self.rows = self.routed.lane_rows  # [T, R]
        self.starts = self.routed.round_starts[:2].contiguous()

    def count(self, rank):
        return int((self.rows[:, rank] >= 0).sum())

    def result(self, rank):
        """What `rank` computes of these tokens: two copies of each row, to be added."""
        y = (self.x.float() * 1.5 + rank).bfloat16()
        return y, (y.float() * 0.37 - 2).bfloat16()


class Rank:
    def __init__(
        self, rank, group, transport, first_epoch, *, chaos_seed=0, timeout_s=20.0, num_slots=4
    ):
        R = self.num_ranks = group.num_ranks
        self.rank, self.first = rank, first_epoch
        self.row = RowFormat.of_dispatch(PAYLOAD, 0, TOPK, weights=True)
        self.bank_bytes = HEAD_BYTES + TOKENS * self.row.row_bytes
        self.native = _engine.Engine(
            transport=transport, interface="lo" if transport.startswith("fabric:tcp") else "", secret=SECRET,
            chaos_seed=chaos_seed + rank if chaos_seed else 0,
        )  # fmt: skip
        self.memory = torch.frombuffer(
            _engine.SharedBuffer(4 * R * self.bank_bytes), dtype=torch.uint8
        )
        self.region = self.native.register(self.memory.data_ptr(), len(self.memory))
        before = [(first_epoch + (first_epoch + bank) % 2 - 2) % 2**64 for bank in (0, 1)]
        self.came, self.released = (words(before * R).view(R, 2) for _ in range(2))
        at = lambda table, r: table[r].data_ptr()  # noqa: E731
        rows = [
            (self.native.open_row(at(self.came, r), f"rows of rank {r}", first_epoch),
             self.native.open_row(at(self.released, r), f"releases of rank {r}", first_epoch))
            for r in range(R)
        ]  # fmt: skip
        all_ranks = group.gather((self.native.address, self.native.describe(self.region), rows))
        self.rows, self.releases, peers = {}, {}, {rank: -1}
        self.others = [r for r in range(R) if r != rank]
        for r in self.others:
            address, descriptor, theirs = all_ranks[r]
            peers[r] = self.native.connect(address)
            self.native.wait_ready(peers[r], 20.0)
            channels = [
                self.native.open_channel(peers[r], self.region, descriptor, row)
                for row in theirs[rank]
            ]
            self.rows[r], self.releases[r] = channels
        me = f"rank {rank}"
        sources = lambda table: [(at(table, r), peers[r], f"rank {r}", 0) for r in range(R)]  # noqa: E731
        self.wait = {
            "credits": self.native.open_wait("credits", me, sources(self.released), list(self.rows.values())),
            "dispatch": self.native.open_wait("dispatch", me, sources(self.came), []),
            "combine": self.native.open_wait("combine", me, sources(self.came), []),
        }  # fmt: skip
        self.ring = DeviceRing(
            self.native, "cpu", num_slots=num_slots, num_words=2, timeout_s=timeout_s
        )
        self.scratch = torch.zeros(4, dtype=torch.int64)  # arrived [2], status
        group.gather(None)  # everybody is ready

    # --- places --------------------------------------------------------------------------------------

    def window_at(self, source, epoch):
        return (2 * source + epoch % 2) * self.bank_bytes

    def region_at(self, target, epoch):
        return (2 * (self.num_ranks + target) + epoch % 2) * self.bank_bytes

    def out_at(self, target, epoch):
        """Where rows for `target` are packed: its send region, or this rank's own window."""
        return (
            self.window_at(self.rank, epoch)
            if target == self.rank
            else self.region_at(target, epoch)
        )

    def address(self, at):
        return self.memory.data_ptr() + at

    def write_headers(self, epoch, counts):
        for r, count in enumerate(counts):
            head = self.memory[self.out_at(r, epoch) :][:HEAD_BYTES]
            head.zero_()
            head[:8] = words([epoch]).view(torch.uint8)
            head[ROWS_AT : ROWS_AT + 4] = words([count], torch.int32).view(torch.uint8)

    def links(self, epoch):
        window_at = self.window_at(self.rank, epoch)
        table = [
            (self.rows[r], self.region_at(r, epoch), window_at, HEAD_BYTES) for r in self.others
        ]
        return words([value for link in table for value in link])

    # --- steps ---------------------------------------------------------------------------------------

    def await_(self, what, epoch, word):
        """On the stream, so nothing is looked at here: kernels behind it look at its status."""
        self.ring.arm(self.wait[what], epoch, word)
        self.ring.stream_wait(word)

    def check(self):
        self.ring.raise_fault()
        self.native.raise_fault()
        assert self.scratch.tolist()[:3] == [0, 0, 0]

    def commit(self, table, epoch):
        return words([table[self.rank].data_ptr() + 8 * (epoch % 2)])

    def release(self, epoch):
        """H7: an immediate of no bytes to each writer."""
        transfers = words(
            [v for r in self.others for v in (self.releases[r] | (epoch & 0xFFFF) << 32, 0, 0, 0)]
        )
        status = torch.zeros(len(self.others), dtype=torch.int32)
        fused.launch(
            "moe_comm_push",
            self.ring.struct,
            transfers,
            status,
            device=transfers.device,
            num_blocks=len(status),
        )
        assert self.ring.status(1) != "ok" or not status.any()

    def dispatch(self, epoch):
        mine = Source(self.rank, self.num_ranks, epoch)
        f, R = self.row, self.num_ranks
        self.await_("credits", (epoch - 2) % 2**64, 0)
        if self.ring.status(0) == "ok":  # a kernel's work
            self.write_headers(epoch, [mine.count(r) for r in range(R)])
        windows = words([self.address(self.out_at(r, epoch) + HEAD_BYTES) for r in range(R)])
        lanes, links = words([*self.others, self.rank], torch.int32), self.links(epoch)
        commits = self.commit(self.came, epoch)
        send = fused.Send(
            x=mine.x.data_ptr(), x_stride=PAYLOAD, payload_bytes=PAYLOAD, topk_idx=mine.idx.data_ptr(),
            topk_weights=mine.weights.data_ptr(), topk=TOPK, lane_rows=mine.rows.data_ptr(),
            starts=mine.starts.data_ptr(), num_lanes=R, last_token=len(mine.x), token_at=f.token_at, ids_at=f.ids_at,
            weights_at=f.weights_at, row_bytes=f.row_bytes, windows=windows.data_ptr(), lanes=lanes.data_ptr(),
            num_links=R - 1, num_local=1, links=links.data_ptr(), commits=commits.data_ptr(), epoch=epoch,
            arrived=self.scratch.data_ptr(), status=self.scratch[2:].data_ptr(), ring=self.ring.struct,
            waited=self.ring.status_address(0),
        )  # fmt: skip
        fused.launch("moe_comm_dispatch_send", send, device=self.scratch.device)
        self.await_("dispatch", epoch, 1)
        sources = [Source(r, R, epoch) for r in range(R)]
        counts = [s.count(self.rank) for s in sources]
        out = torch.full((sum(counts), HIDDEN), -3, dtype=torch.bfloat16)
        for r in range(R):
            first = sum(counts[:r])
            positions = torch.arange(first, first + counts[r], dtype=torch.int32)
            told = self.commit(self.released, epoch)
            unpack = fused.Unpack(
                rows=self.address(self.window_at(r, epoch) + HEAD_BYTES),
                num_rows=self.address(self.window_at(r, epoch) + ROWS_AT), row_bytes=f.row_bytes,
                payload_bytes=PAYLOAD, positions=positions.data_ptr(), num_positions=1, out_x=out.data_ptr(),
                words=told.data_ptr(), num_words=int(r == self.rank), epoch=epoch, arrived=self.scratch.data_ptr(),
                waited=self.ring.status_address(1),
            )  # fmt: skip
            self.ring.raise_fault()  # only so that the test says why
            self.check_window(sources[r], r, epoch)
            fused.launch("moe_comm_dispatch_unpack", unpack, device=self.scratch.device)
        self.release(epoch)
        self.check()
        want = torch.cat([s.x[s.rows[:, self.rank] >= 0] for s in sources])
        assert torch.equal(bits(out), bits(want))
        return sources

    def check_window(self, source, r, epoch):
        """Every byte of every row as the twin packs it."""
        f = self.row
        want = torch.zeros(TOKENS, f.row_bytes, dtype=torch.uint8)
        TORCH.pack(
            want, source.x, source.rows, source.starts[0], topk_idx=source.idx, topk_weights=source.weights,
            lane=self.rank, first_token=0, last_token=len(source.x), token_at=f.token_at, ids_at=f.ids_at,
            weights_at=f.weights_at,
        )  # fmt: skip
        at, count = self.window_at(r, epoch), source.count(self.rank)
        head = self.memory[at : at + HEAD_BYTES]
        assert head[:8].view(torch.int64).item() == words([epoch]).item()
        assert head[ROWS_AT : ROWS_AT + 4].view(torch.int32).item() == count
        got = self.memory[at + HEAD_BYTES :][: count * f.row_bytes].view(count, f.row_bytes)
        used = max(f.weights_at + 4 * TOPK, f.ids_at + 4 * TOPK)  # padding is nobody's
        assert torch.equal(got[:, :used], want[:count, :used]), f"rows of rank {r}, epoch {epoch}"

    def combine(self, epoch, sources):
        R, device = self.num_ranks, self.scratch.device
        mine = sources[self.rank]
        counts = [s.count(self.rank) for s in sources]
        copies = [
            torch.cat([s.result(self.rank)[c][s.rows[:, self.rank] >= 0] for s in sources])
            for c in (0, 1)
        ]
        y, total = torch.cat(copies), sum(counts)
        place = torch.arange(total)
        offsets = torch.stack([place * PAYLOAD, (total + place) * PAYLOAD], 1).contiguous()
        self.await_("credits", (epoch - 2) % 2**64, 0)
        self.write_headers(epoch, counts)
        groups = words(
            [v for r in [*self.others, self.rank]
             for v in (self.address(self.out_at(r, epoch) + HEAD_BYTES), PAYLOAD, sum(counts[:r]), counts[r])]
        )  # fmt: skip
        links, commits = self.links(epoch), self.commit(self.came, epoch)
        common = {
            "payload_bytes": PAYLOAD, "row_bytes": PAYLOAD, "num_local": 1, "epoch": epoch,
            "arrived": self.scratch.data_ptr(), "status": self.scratch[2:].data_ptr(), "ring": self.ring.struct,
        }  # fmt: skip
        send = fused.Combine(
            memory=y.data_ptr(), offsets=offsets.data_ptr(), num_terms=2, groups=groups.data_ptr(), num_links=R - 1,
            links=links.data_ptr(), commits=commits.data_ptr(), waited=self.ring.status_address(0), **common,
        )  # fmt: skip
        fused.launch("moe_comm_combine_send_bf16", send, device=device)
        self.await_("combine", epoch, 1)
        bases = torch.tensor([self.window_at(r, epoch) + HEAD_BYTES for r in range(R)])
        back = torch.where(mine.rows >= 0, bases + mine.rows.long() * PAYLOAD, -1).contiguous()
        out = torch.full_like(mine.x, 9)
        group, told = (
            words([out.data_ptr(), PAYLOAD, 0, len(out)]),
            self.commit(self.released, epoch),
        )
        add = fused.Combine(
            memory=self.memory.data_ptr(), offsets=back.data_ptr(), num_terms=R, groups=group.data_ptr(),
            commits=told.data_ptr(), waited=self.ring.status_address(1), **common,
        )  # fmt: skip
        fused.launch("moe_comm_combine_send_bf16", add, device=device)
        self.release(epoch)
        self.check()
        assert torch.equal(bits(out), bits(expected_sum(mine, R)))

    def close(self, group):
        group.gather(None)  # nobody leaves while another one's releases are on their way
        self.ring.close()  # takes what was pushed
        self.native.stop()
        return self.ring.stats()


def expected_sum(mine, num_ranks):
    """By the twin: each rank's own two copies, rounded, then the ranks."""
    partial = []
    for r in range(num_ranks):
        memory = torch.cat(mine.result(r)).view(torch.uint8).view(-1)
        place = torch.arange(len(mine.x)) * PAYLOAD
        rows = torch.empty_like(mine.x)
        TORCH.reduce(rows, memory, torch.stack([place, place + mine.x.nbytes], 1))
        partial.append(rows)
    memory = torch.cat(partial).view(torch.uint8).view(-1)
    place = torch.arange(len(mine.x))[:, None] * PAYLOAD + torch.arange(num_ranks) * mine.x.nbytes
    out = torch.empty_like(mine.x)
    TORCH.reduce(out, memory, torch.where(mine.rows >= 0, place, -1).contiguous())
    return out
