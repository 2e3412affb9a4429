"""KernelForwarder: what a rank does for others between nodes (hops="node"), by kernels on a stream of its own.

    dispatch:  rows of a rail peer ─→ ranks of this node that hold one of their experts
    combine:   results of this node's ranks for a rail peer's tokens ─add, level 1─→ that peer

Begun behind what the call sends and joined before what it receives, so nobody who waits for these rows depends on this
rank's hook. As csrc/forward.cpp does it for CPU tensors, header for header and byte for byte (kernels/relay.cuh).

Rows of a link are numbered on the device; the host knows only that there are at most `max_tokens` of each, so a
handle's table has so many for each link, −1 behind the real ones. *Source*: ours.
"""

import concurrent.futures
import dataclasses
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from . import _engine
from .dispatch import COMBINE, DISPATCH
from .group import Topology
from .handle import Handle
from .kernel_told import HEADER_BYTES, LINKS, NAP_S, Round, Windows
from .layout import RowFormat, counts_bytes

if TYPE_CHECKING:
    from .kernel_exchange import KernelExchange


@dataclasses.dataclass(frozen=True)
class Passed:
    """What a forwarder must know of a call: its format, and what its headers say."""

    found: _engine.CallFormat
    like: Tensor  # the first of it is this rank's own header
    row: RowFormat
    identity: int = 0  # the address of a handle's; of a fresh dispatch 0
    handle: Handle | None = None
    timeout_s: float | None = None
    num_experts: int = 0  # of a fresh dispatch
    max_tokens: int = 0  # likewise
    timed: bool = False


class KernelForwarder:
    """One for each KernelExchange between nodes, which calls `close` behind its ring's."""

    def __init__(self, exchange: "KernelExchange", topology: Topology):
        self.exchange = exchange
        node, nodes, ranks = topology.node, topology.num_nodes, topology.node_ranks
        self._num_ranks, self._node, self._node_ranks = topology.num_ranks, node, ranks
        others = [n for n in range(nodes) if n != node]
        rank_of, my_local = topology.rank_of, topology.local_of[topology.rank]
        self._rails = [rank_of[n * ranks + my_local] for n in others]
        here = list(rank_of[node * ranks : (node + 1) * ranks])
        self._writers = here * len(others)  # of results, by (node, local)
        constant = exchange.constant
        self._rank_of = constant(list(rank_of))
        local = [topology.local_of[r] if r in here else -1 for r in range(topology.num_ranks)]
        self._local_of_rank = constant(local, torch.int32)
        # The terms of a token's sum: lanes, and who wrote them, by node; those of this node are added first.
        lanes: list[int] = []
        self.sum_ranks: list[int] = []
        for n in range(nodes):
            lanes += range(ranks) if n == node else [ranks + n]
            self.sum_ranks += here if n == node else [rank_of[n * ranks + my_local]]
        self.sum_lanes, self.inner = constant(lanes), (node, node + ranks)
        links = exchange.lanes.numbers[: exchange.num_links]
        self._lanes = exchange.lanes._replace(numbers=links, num_local=0, commits="")
        self._damaged: dict[_engine.CallFormat, Tensor] = {}
        self._stream: Any = None
        self._thread: concurrent.futures.ThreadPoolExecutor | None = None
        if exchange.device.type == "cuda":
            self._stream = torch.cuda.Stream(exchange.device)
        else:
            self._thread = concurrent.futures.ThreadPoolExecutor(1, "moe_comm:forward")
        self._last: Any = None

    # --- the stream ------------------------------------------------------------------------------

    def begin(self, call: Round, used: tuple[Tensor | None, ...], work: Callable[[], None]) -> None:
        """On this forwarder's stream, behind what was launched on the exchange's, which is the current one."""
        if self._thread is not None:
            call.forwarded = self._last = self._thread.submit(work)
            return
        self._stream.wait_stream(torch.cuda.current_stream(self.exchange.device))
        for tensor in (call.block, *used):
            if tensor is not None:
                tensor.record_stream(self._stream)
        with torch.cuda.stream(self._stream):
            work()
        call.forwarded = torch.cuda.Event()
        call.forwarded.record(self._stream)

    def join(self, call: Round) -> None:
        """What the exchange's stream, the current one, is given next comes behind it."""
        if self._thread is not None:
            call.forwarded.result()
        else:
            torch.cuda.current_stream(self.exchange.device).wait_event(call.forwarded)

    def drain(self, left: Callable[[], float]) -> None:
        """Waits until others have what they need of this rank, at most `left()` seconds."""
        if self._thread is not None:
            if self._last is not None:
                concurrent.futures.wait([self._last], left())
            return
        while not self._stream.query() and left():
            time.sleep(NAP_S)

    def close(self) -> None:
        if self._thread is not None:
            self._thread.shutdown()

    # --- dispatch --------------------------------------------------------------------------------

    def write_headers(
        self, call: Round, like: Tensor, routed: Any, num_counts: int, **fields: Any
    ) -> None:
        """Of a fresh dispatch: those for a node say how many rows each of its ranks gets, and copies each expert."""
        exchange, ranks = self.exchange, self._node_ranks
        copies = routed.expert_counts.view(self._num_ranks, num_counts)
        by_rank = torch.cat([routed.rank_counts[:, None], copies], 1).index_select(0, self._rank_of)
        here = self._rank_of[self._node * ranks : (self._node + 1) * ranks]
        of_node = copies.index_select(0, here)
        link_words = ranks * (1 + num_counts)
        exchange.write_headers(
            call, like, exchange.lanes, slice(0, exchange.num_links),  # their lanes are behind the node's ranks
            counts=by_rank.data_ptr() - 4 * ranks * link_words, num_counts=link_words,
            counts_bytes=self._counts_bytes(num_counts, by_node=True), **fields,
        )  # fmt: skip
        exchange.write_headers(
            call, like, exchange.lanes, slice(exchange.num_links, None), counts=of_node.data_ptr(),
            num_counts=num_counts, counts_bytes=self._counts_bytes(num_counts, by_node=False), **fields,
        )  # fmt: skip

    def pass_rows(self, call: Round, passed: Passed) -> tuple[Tensor, Tensor]:
        """A dispatch's rows. Returns the tables for its handle: tokens [links · max_tokens] int32, and rows
        [links · max_tokens, G]; −1 behind the real ones."""
        exchange, row, handle = self.exchange, passed.row, passed.handle
        links, ranks = exchange.num_links, self._node_ranks
        exchange.await_links(call, DISPATCH, passed.timeout_s, passed.timed)
        heads = {"head_bytes": HEADER_BYTES, "to_head_bytes": HEADER_BYTES}
        if handle is not None:
            tokens = handle.forward_tokens
            table, sent, here = self._of_handle(handle)
            told = exchange.check_headers(
                call, passed.like, "link_in", links, capacity=passed.found.capacity, expected=sent.data_ptr(),
                identity=passed.identity, word=LINKS,
            )  # fmt: skip
            self._pass_headers(call, told, passed, rows=here.data_ptr())
        else:
            num_counts = -(-passed.num_experts // self._num_ranks)
            heads["head_bytes"] += (link_bytes := self._counts_bytes(num_counts, by_node=True))
            heads["to_head_bytes"] += (slot_bytes := self._counts_bytes(num_counts, by_node=False))
            link_words = ranks * (1 + num_counts)
            told = exchange.check_headers(
                call, passed.like, "link_in", links, link_words,
                capacity=min(passed.found.capacity, passed.max_tokens),  # its rows fit the table
                counts_bytes=link_bytes, word=LINKS,
            )  # fmt: skip
            self._pass_headers(call, told, passed, num_counts=num_counts, counts_bytes=slot_bytes)
            counts = told.copies(link_words).view(links, ranks, 1 + num_counts)[:, :, 0]
            tokens, table = self._number_rows(
                call, told, passed, counts, heads["head_bytes"], num_counts
            )
        exchange.forward(
            call, num_links=links, num_rows=told.rows.data_ptr(), row_bytes=row.row_bytes, table=table.data_ptr(),
            table_rows=table.shape[1], **heads,
        )  # fmt: skip
        return tokens, table.view(-1, ranks)

    def _number_rows(
        self, call: Round, told: Any, passed: Passed, counts: Tensor, head_bytes: int, num_counts: int
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """The token of each link's row [links · max_tokens], and its number for each rank of the node [links,
        max_tokens, G]. `counts` [links, G]."""
        exchange, row, most = self.exchange, passed.row, passed.max_tokens
        links, part_bytes = exchange.num_links, 4 + 4 * row.topk
        parts = exchange.new_parts(links * most, part_bytes)
        parts.fill_(255)  # rows that did not come have ids -1
        first = torch.arange(links, dtype=torch.int32, device=exchange.device) * most
        exchange.collect(
            Windows(exchange.at(call, "link_in"), told.rows, first, head_bytes), parts, row_bytes=row.row_bytes,
            part_at=row.token_at, part_bytes=part_bytes,
        )  # fmt: skip
        numbered = exchange.kernels.forward_tables(
            parts, self._local_of_rank, exchange.zeros[: self._node_ranks], experts_per_rank=num_counts,
            topk=row.topk, token_at=0, ids_at=4,
        )  # fmt: skip
        rows = numbered.rows.view(links, most, self._node_ranks)
        before = counts.cumsum(0, dtype=torch.int32) - counts  # rows of other links
        return numbered.tokens, torch.where(rows >= 0, rows - before[:, None], -1)

    def _pass_headers(self, call: Round, told: Any, passed: Passed, **fields: Any) -> None:
        exchange = self.exchange
        exchange.pass_on(
            call, sources=exchange.at(call, "link_in"), verdicts=told.verdicts.data_ptr(), rounds=told.most_rounds,
            damaged=self._damaged_like(passed.found, self._rails).data_ptr(), outs_per_source=self._node_ranks,
            sources_per_out=1, windows=exchange.at(call, "passed"), num_outs=exchange.num_links * self._node_ranks,
            **fields,
        )  # fmt: skip

    # --- combine ---------------------------------------------------------------------------------

    def add_rows(self, call: Round, passed: Passed, dtype: torch.dtype, columns: bool) -> None:
        """A combine's sums for the rail peers."""
        exchange, row, handle = self.exchange, passed.row, passed.handle
        assert handle is not None
        links, ranks = exchange.num_links, self._node_ranks
        exchange.await_links(call, COMBINE, passed.timeout_s)
        told = exchange.check_headers(
            call, passed.like, "gathered", links * ranks, capacity=passed.found.capacity, identity=passed.identity,
            word=LINKS,
        )  # fmt: skip
        table, sent, _ = self._of_handle(handle)
        exchange.pass_on(
            call, sources=exchange.at(call, "gathered"), verdicts=told.verdicts.data_ptr(), rounds=told.most_rounds,
            damaged=self._damaged_like(passed.found, self._writers).data_ptr(), outs_per_source=1,
            sources_per_out=ranks, own=passed.like.data_ptr(), identity=passed.identity, tokens=handle.num_tokens,
            rows=sent.data_ptr(), windows=exchange.at(call, "sends"), num_outs=links,
            groups=exchange.at(call, "groups"), row_bytes=row.row_bytes, table_rows=table.shape[1],
        )  # fmt: skip
        windows = (
            exchange.table(call, "gathered", links * ranks).view(links, 1, ranks) + HEADER_BYTES
        )
        offsets = torch.where(table >= 0, windows + table.long() * row.row_bytes, -1)
        exchange.send_sums(
            dtype, call, self._lanes, LINKS, offsets=offsets.data_ptr(), num_terms=ranks,
            payload_bytes=row.payload_bytes, row_bytes=row.row_bytes, num_columns=row.topk if columns else 0,
            columns_at=row.weights_at,
        )  # fmt: skip

    # --- a rank that refuses ---------------------------------------------------------------------

    def refuse(self, call: Round, kind: int, passed: Passed) -> None:
        """It passes the others' headers on, and its own text to rail peers; no rows."""
        exchange = self.exchange
        exchange.await_links(call, kind, passed.timeout_s)
        zeros = exchange.zeros.data_ptr()
        if kind == DISPATCH:
            told = exchange.check_headers(
                call, passed.like, "link_in", exchange.num_links, word=LINKS
            )
            self._pass_headers(call, told, passed, rows=zeros)
            exchange.forward(call)
            return
        exchange.pass_on(
            call, outs_per_source=1, own=passed.like.data_ptr(), rows=zeros, windows=exchange.at(call, "sends"),
            num_outs=exchange.num_links,
        )  # fmt: skip
        exchange.send_rows(
            call, self._lanes, LINKS, starts=zeros, lane_rows=zeros, head_bytes=HEADER_BYTES
        )

    # --- tables ----------------------------------------------------------------------------------

    def _of_handle(self, handle: Handle) -> tuple[Tensor, Tensor, Tensor]:
        """The table [links, M, G]; how many rows each link brought [links], and how many went to whom [links, G]."""
        table = handle.forward_rows.view(self.exchange.num_links, -1, self._node_ranks)
        hits = table >= 0
        return (
            table,
            hits.any(2).sum(1, dtype=torch.int32),
            hits.sum(1, dtype=torch.int32).contiguous(),
        )

    def _counts_bytes(self, num_counts: int, *, by_node: bool) -> int:
        num_experts = num_counts * self._num_ranks
        return counts_bytes(num_experts, self._num_ranks, self._node_ranks, by_node=by_node)

    def _damaged_like(self, found: _engine.CallFormat, writers: list[int]) -> Tensor:
        """Headers for each source, kept as long as the Buffer keeps its formats."""
        made = self._damaged.get(found)
        if made is None:
            native = self.exchange.native
            headers = b"".join(native.damaged_like(found, writer) for writer in writers)
            made = torch.frombuffer(bytearray(headers), dtype=torch.uint8).to(self.exchange.device)
            self._damaged[found] = made
        return made
