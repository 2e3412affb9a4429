"""Calls of several rounds by kernels: each round is an exchange of its own for a range of tokens (kernel_calls.py).

    dispatch:  tokens 0 … C, C … 2C, …  ─rounds─→  rows as they came ─┐ sizes of all rounds are known: places,
                                                   rows as they came ─┴→ outputs, as if there had been one round
    combine:   for each round of the dispatch its rows, wherever they lie in y ─→ out[0 … C], out[C … 2C], …

Where a Buffer's max_tokens do not fit one round, or it has none. How many rounds there are is the maximum over the
ranks, said in every header; a rank with fewer tokens sends empty rounds, one with wrong input refuses each. The host
reads the headers' numbers of every round, so such calls wait for it, and cannot be captured.

C (`chunk`) is the same for every dispatch of a Buffer whose rows are not wider than what it was made for. A combine
takes its dispatch's rounds, or more where its rows are wider, or its Buffer's windows smaller. A handle's tables are
those of one round but for what `parts_of` reads: `told` and `forward_rows` of the rounds, one behind the other,
lane_rows that count from each round's start, and in `forward_tokens` the number of each row, by round, and behind
those the tokens of rows that were passed on. Reading them waits for the stream, on which every wait has its deadline.

On the CPU rounds share one set of counts (csrc/exchange.hpp); here each has its own. *Source*: ours.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .combine import CombineRequest
from .dispatch import Dispatched, DispatchRequest
from .errors import ArgumentError, MismatchError
from .handle import Handle
from .kernel_calls import KernelCombine, KernelDispatch
from .kernel_judges import wrong_routing
from .kernel_told import Round, Told, Windows


def dispatch_call(buffer: Any, request: DispatchRequest) -> Any:
    """A dispatch of a Buffer of kernels."""
    return _call(buffer, request, KernelDispatch, DispatchInRounds)


def combine_call(buffer: Any, request: CombineRequest) -> Any:
    """A combine likewise."""
    return _call(buffer, request, KernelCombine, CombineInRounds)


def _call(buffer: Any, request: Any, one: Callable[..., Any], several: Callable[..., Any]) -> Any:
    handle = request.handle
    if buffer.kernels.in_rounds or (isinstance(handle, Handle) and num_parts(handle) > 1):
        return several(buffer, request)
    call = one(buffer, request)
    if call.error is None:  # rows may be wider than what the Buffer was made for
        most = buffer.max_tokens if handle is None else handle.chunk
        return call if most <= call.format.capacity else several(buffer, request)
    if buffer.kernels.capturing():
        return call
    refused = several(buffer, request)  # the others may take more rounds than one
    refused.refuse(call.text)
    return refused


# --- a handle's rounds ---------------------------------------------------------------------------


def _words(handle: Handle) -> int:
    """Of a round in `told`."""
    num_ranks = len(handle.tokens_of)
    return Told.num_words(num_ranks, -(-handle.num_experts // num_ranks))


def num_parts(handle: Handle) -> int:
    """How many rounds its dispatch took."""
    return max(1, len(handle.told) // max(1, _words(handle)))


def parts_of(handle: Handle, capacity: int) -> list[Handle]:
    """A handle for each round of a call whose windows hold `capacity` tokens; itself if one will do. Asks the device
    for sizes, once."""
    if num_parts(handle) == 1 and handle.chunk <= capacity:
        return [handle]
    if handle.parts is None:
        handle.parts = {}
    made: list[Handle] | None = handle.parts.get(capacity)
    if made is None:
        rounds = _rounds_of(handle)
        if handle.chunk > capacity:
            rounds = [piece for part in rounds for piece in _split(part, capacity)]
        made = handle.parts[capacity] = rounds
    return made


def _rounds_of(handle: Handle) -> list[Handle]:
    """As the dispatch had them."""
    count, num_rows = num_parts(handle), len(handle.forward_tokens) - len(handle.forward_rows)
    order, link_tokens = handle.forward_tokens[:num_rows], handle.forward_tokens[num_rows:]
    if count == 1:
        return [dataclasses.replace(handle, forward_tokens=link_tokens)]
    told = handle.told.view(count, -1)
    each, parts, first = len(link_tokens) // count, [], 0
    for k, end in enumerate(told[:, 3].cpu().cumsum(0).tolist()):
        rows, links = order[first:end], slice(k * each, (k + 1) * each)
        places = rows[:, None]
        if handle.layout != "rank":
            places = handle.positions.index_select(0, rows)
        lane_rows = handle.lane_rows[k * handle.chunk : (k + 1) * handle.chunk]
        parts.append(dataclasses.replace(
            handle, told=told[k], lane_rows=lane_rows, num_tokens=len(lane_rows), positions=places,
            recv_tokens=handle.recv_tokens.index_select(0, rows) - k * handle.chunk,
            forward_tokens=link_tokens[links], forward_rows=handle.forward_rows[links],
        ))  # fmt: skip
        first = end
    return parts


def _split(part: Handle, capacity: int) -> list[Handle]:
    """One round as several, where windows are smaller than the dispatch's. All tables are in the order of tokens."""
    num_ranks, whole = len(part.tokens_of), part.told.cpu()
    count, num_rows = max(1, -(-int(whole[7]) // capacity)), int(Told(whole, num_ranks).num_rows)
    tokens, rows = part.recv_tokens[:num_rows], Told(part.told, num_ranks).rows.long()
    ranks = torch.arange(num_ranks, device=rows.device)
    source = torch.repeat_interleave(ranks, rows, output_size=num_rows)
    pieces = []
    for first in range(0, count * capacity, capacity):
        kept = ((tokens >= first) & (tokens < first + capacity)).nonzero()[:, 0]
        told = part.told.clone()
        numbers = Told(told, num_ranks)
        numbers.rows.copy_(torch.bincount(source[kept], minlength=num_ranks))
        numbers.starts.copy_(numbers.rows.cumsum(0) - numbers.rows)
        numbers.num_rows.fill_(len(kept))
        lane_rows = part.lane_rows[first : first + capacity]
        before = (part.lane_rows[:first] >= 0).sum(0)
        places = kept[:, None].int() if not len(part.positions) else part.positions[kept]
        link_tokens, forward_rows = _split_forward(part, first, capacity)
        pieces.append(dataclasses.replace(
            part, told=told, num_tokens=len(lane_rows), recv_tokens=tokens[kept] - first, positions=places,
            lane_rows=torch.where(lane_rows >= 0, lane_rows - before, -1).int(), chunk=capacity,
            forward_tokens=link_tokens, forward_rows=forward_rows,
        ))  # fmt: skip
    return pieces


def _split_forward(part: Handle, first: int, capacity: int) -> tuple[Tensor, Tensor]:
    """What the forwarder passed on of tokens from `first` on: their tokens and its table."""
    if not len(part.forward_rows):
        return part.forward_tokens, part.forward_rows
    ranks = part.forward_rows.shape[1]
    tokens = part.forward_tokens.view(-1, part.chunk)  # [links, M], -1 behind the rows that came
    table = part.forward_rows.view(*tokens.shape, ranks)
    before = (tokens >= 0) & (tokens < first)
    rows = before.sum(1)[:, None] + torch.arange(capacity, device=tokens.device)
    there = rows.clamp(max=part.chunk - 1)
    moved = tokens.gather(1, there)
    good = (rows < part.chunk) & (moved >= first) & (moved < first + capacity)
    found = table.gather(1, there[:, :, None].expand(-1, -1, ranks))
    numbers = found - ((table >= 0) & before[:, :, None]).sum(1)[:, None]
    found = torch.where(good[:, :, None] & (found >= 0), numbers, -1)
    return torch.where(good, moved - first, -1).int().view(-1), found.int().view(-1, ranks)


# --- rounds of a call ----------------------------------------------------------------------------


class RoundOfDispatch(KernelDispatch):
    """One round; its rows are kept as they came, unless a handle says where they go."""

    in_rounds = True

    def __init__(self, buffer: Any, request: DispatchRequest, rounds: int = 1, chunk: int = 0):
        self.rounds, self.chunk = rounds, chunk
        super().__init__(buffer, request)

    def _place(self) -> None:
        assert self.known is not None
        exchange, size = self.exchange, self.row.row_bytes
        self.rows = exchange.new((int(self.known.num_rows), size), torch.uint8)
        exchange.unpack(
            self.call,
            self.windows(),
            row_bytes=size,
            payload_bytes=size,
            out_x=self.rows.data_ptr(),
        )


class RoundOfCombine(KernelCombine):
    """One round."""

    in_rounds = True

    def __init__(self, buffer: Any, request: CombineRequest, rounds: int = 1):
        self.rounds = rounds
        super().__init__(buffer, request)


class InRounds:
    """As a pending call of one round, to Buffer."""

    whole: Any  # the call as it was asked for: its checks, and what becomes of the rounds; nothing of it is sent

    def __init__(self, buffer: Any, request: Any):
        self.buffer, self.request, self.exchange = buffer, request, buffer.kernels
        self.call, self.ordered = Round(), True
        self.parts: list[Any] = []
        self.error: ArgumentError | None = None
        self.result: Dispatched | None = None
        self.event: Any = None
        if self.exchange.capturing():
            self.refuse(
                f"max_tokens: expected as many as fit one round while a graph is captured, got {buffer.max_tokens}: "
                "more window_bytes hold more"
            )
            return
        self.whole = self._whole()
        if self.whole.error is not None:
            self.refuse(str(self.whole.error))
            return
        try:
            self._begin()
        except RuntimeError as error:  # whatever is wrong: the peers wait for our header
            self.refuse(str(error))

    def refuse(self, text: str) -> None:
        """This rank takes part with no tokens and `text`; `finish` raises it."""
        self.error, self.call.own_rounds = ArgumentError(text), 1

    # What the two kinds do.

    def _whole(self) -> Any: ...

    def _begin(self) -> None: ...

    def _part(self, number: int) -> Any: ...

    def _join(self) -> Any: ...

    def _refused(self, text: str) -> Any: ...

    # As Buffer calls them.

    def send(self) -> None:
        number = len(self.parts)
        if self.error is not None:
            part = self._refused(str(self.error))
        elif number < self.call.own_rounds or self.request.handle is None:
            part = self._part(number)
        else:
            part = self._refused(
                f"handle: expected one of {number + 1} rounds or more, got {number}"
            )
        self.parts.append(part)
        self.call.epochs.append(self.exchange.next_epoch)
        part.send()

    def receive_first(self) -> None:
        first = self.parts[0]
        first.receive_first()
        self.call.num_rounds = max(self.call.own_rounds, first.call.num_rounds)
        self.call.refusal = first.call.refusal

    def receive(self, round_idx: int) -> None:
        part = self.parts[round_idx]
        if round_idx:
            part.receive_first()
        part.receive(0)

    def finish(self) -> Any:
        if self.error is not None:
            raise self.error
        for part in self.parts:
            if part.report is not None:
                part.report.look()
            if part.error is not None:
                raise part.error
        return self._join()


def is_bad(told: Told) -> bool:
    """A wait failed, a header is wrong, or this rank's routing."""
    status, bad, _, _, error = told.words[:5].tolist()
    return bool(status or bad or error)


def used_by_stream(exchange: Any, handle: Handle) -> None:
    """Tables that were made on the caller's stream."""
    exchange.used_by_stream(
        handle.told, handle.lane_rows, handle.recv_tokens, handle.positions, handle.forward_rows, handle.forward_tokens
    )  # fmt: skip


def range_of(handles: list[Handle], number: int) -> tuple[int, int]:
    """Tokens of a round."""
    first = sum(handle.num_tokens for handle in handles[:number])
    return first, first + handles[number].num_tokens


def _range(tensor: Any, first: int, last: int) -> Any:
    if isinstance(tensor, (tuple, list)):
        return tuple(part[first:last] for part in tensor)
    return None if tensor is None else tensor[first:last]


class DispatchInRounds(InRounds):
    """Dispatches by rounds."""

    chunk = 0  # tokens of a round, of a fresh one

    def _whole(self) -> RoundOfDispatch:
        return RoundOfDispatch(self.buffer, self.request)

    def _refused(self, text: str) -> RoundOfDispatch:
        nothing = dataclasses.replace(self.request, x=None, wait_ns=None)
        part = RoundOfDispatch(self.buffer, nothing)
        part.refuse(text)
        return part

    def _begin(self) -> None:
        whole, exchange, handle = self.whole, self.exchange, self.request.handle
        if handle is not None:
            self.handles = parts_of(handle, whole.format.capacity)
            self.call.own_rounds = len(self.handles)
            with exchange.on_stream():
                whole.given = whole.outputs(handle.place_shape, whole.expand or not handle.number)
            return
        self.chunk = min(whole.format.capacity, exchange.chunk)
        self.call.own_rounds = max(1, -(-len(whole.x) // self.chunk))
        with exchange.on_stream():  # as the CPU does, before anything is sent
            routed = exchange.kernels.route(
                whole.idx, exchange.lane_of_rank, num_experts=whole.num_experts, num_ranks=exchange.num_ranks,
                num_lanes=exchange.num_lanes, capacity=self.chunk,
            )  # fmt: skip
            text = wrong_routing(routed.error.tolist(), whole.num_experts, whole.idx)
        if text:
            self.refuse(text)

    def _part(self, number: int) -> RoundOfDispatch:
        changed: dict[str, Any] = {"out": None}
        if self.request.handle is not None:
            first, last = range_of(self.handles, number)
            changed["handle"] = self.handles[number]
            used_by_stream(self.exchange, self.handles[number])
        else:
            first = min(number * self.chunk, len(self.whole.x))
            last = min(first + self.chunk, len(self.whole.x))
            changed |= {
                "topk_idx": _range(self.request.topk_idx, first, last), "layout": "rank",
                "topk_weights": _range(self.request.topk_weights, first, last),
            }  # fmt: skip
        changed["x"] = _range(self.request.x, first, last)
        request = dataclasses.replace(self.request, **changed)
        part = RoundOfDispatch(self.buffer, request, self.call.own_rounds, self.chunk)
        if self.request.handle is not None:
            part.given = self.whole.given
        return part

    def finish(self) -> Dispatched:
        if not any(call.error is not None for call in (self, *self.parts)):
            known = [part.known for part in self.parts]
            if not any(map(is_bad, known)):
                self._check_tokens(known)
        found: Dispatched = super().finish()
        return found

    def _join(self) -> Dispatched:
        whole, handle = self.whole, self.request.handle
        whole.call, whole.ordered = self.parts[-1].call, self.ordered
        if handle is not None:
            x, scales = whole.given
            whole.out = (x if scales is None else (x, scales), None, None)
            whole.tokens_per_expert, whole.recv_tokens = (
                handle.tokens_per_expert,
                handle.recv_tokens,
            )
            whole.positions, whole.told = handle.positions, self.parts[0].told
            self.result = whole.finish()
        else:
            with self.exchange.on_stream():
                self._place()
            if whole.error is not None:
                raise whole.error
            self.result = self._handed_out()
        self.event = whole.event
        return self.result

    def _check_tokens(self, known: list[Told]) -> None:
        """max_tokens of the call, as a round knows only its own tokens."""
        self.tokens_of = torch.stack([told.tokens for told in known]).sum(0)
        allowed, allower = min((int(told.words[9]) % 2**64, int(told.words[10])) for told in known)
        most, rank = map(int, self.tokens_of.max(0))
        if most > allowed:
            raise MismatchError(
                f"dispatch epoch {self.call.epochs[0]}: max_tokens: rank {allower} passed {allowed}, "
                f"rank {rank} has {most} tokens"
            )

    def _place(self) -> None:
        """The rows of all rounds, by (source rank, source token): each round and source is a source here."""
        whole, exchange = self.whole, self.exchange
        device, size = exchange.device, whole.row.row_bytes
        rows = torch.stack(
            [part.known.rows for part in self.parts]
        ).long()  # [rounds, R], on the host
        totals = rows.sum(0)
        starts = (totals.cumsum(0) - totals)[None] + rows.cumsum(0) - rows
        inside = (rows.cumsum(1) - rows) * size
        addresses = inside + torch.tensor([part.rows.data_ptr() for part in self.parts])[:, None]
        num_rows = int(totals.sum())
        tables = torch.stack([addresses, rows, starts]).flatten(1).to(device)
        small = tables[1:].int()
        windows = Windows(tables[0].data_ptr(), small[0], small[1], 0, free=False)
        whole.num_counts = self.parts[0].num_counts
        whole.told = self.parts[0].told
        total = torch.stack([whole.copies_of(part.told) for part in self.parts]).sum(0)
        counts = torch.stack([whole.copies_of(part.known) for part in self.parts]).sum(0)
        whole.place(windows, total, num_rows, counts)
        if whole.error is not None:
            return
        # The rows by (round, source, token): their numbers, and those of their tokens in the call.
        arange = torch.arange(num_rows, device=device)
        ends = tables[1].cumsum(0)
        shift = tables[2] - (ends - tables[1])
        self.order = arange + torch.repeat_interleave(shift, tables[1], output_size=num_rows)
        numbers = torch.arange(len(self.parts), device=device).repeat_interleave(exchange.num_ranks)
        before = torch.repeat_interleave(numbers, tables[1], output_size=num_rows) * self.chunk
        self.whole.recv_tokens = whole.recv_tokens.index_add(0, self.order, before.int())
        self.totals = totals
        self.kept = (tables, small)  # until the kernels that read them were launched

    def _handed_out(self) -> Dispatched:
        whole, exchange, parts = self.whole, self.exchange, self.parts
        with exchange.on_stream():
            lane_rows = torch.cat([part.lane_rows for part in parts])
            forward_rows = torch.cat([part.forward_rows for part in parts])
            told = torch.cat([part.told.words for part in parts])
            order = torch.cat([self.order.int(), *(part.forward_tokens for part in parts)])
        handle = Handle(
            group_key=self.buffer.group_key, number=int(parts[0].known.words[2]), rank=exchange.rank,
            hops=self.buffer.hops, layout=self.request.layout, num_experts=whole.num_experts, topk=whole.topk,
            num_tokens=len(whole.x), num_places=whole.places, place_shape=whole.shape,
            tokens_of=tuple(self.tokens_of.tolist()), totals=tuple(self.totals.tolist()),
            forward_counts=(0,) * self.buffer.topology.num_nodes, lane_rows=lane_rows,
            recv_tokens=whole.recv_tokens, positions=whole.positions, forward_tokens=order, forward_rows=forward_rows,
            tokens_per_expert=whole.tokens_per_expert, told=told, generation=self.buffer.generation, chunk=self.chunk,
        )  # fmt: skip
        return whole.hand_out(handle, lane_rows, forward_rows, told, order)


class CombineInRounds(InRounds):
    """Combines by the rounds of the handle's dispatch."""

    def _whole(self) -> RoundOfCombine:
        return RoundOfCombine(self.buffer, self.request)

    def _refused(self, text: str) -> RoundOfCombine:
        nothing: Any = dataclasses.replace(self.request, handle=None, wait_ns=None)
        part = RoundOfCombine(self.buffer, nothing)
        part.refuse(text)
        return part

    def _begin(self) -> None:
        whole, handle = self.whole, self.request.handle
        self.handles = parts_of(handle, whole.format.capacity)
        self.call.own_rounds = len(self.handles)
        whole.made = self.request.out
        if whole.made is None:
            with self.exchange.on_stream():
                whole.made = self.exchange.new((handle.num_tokens, whole.y.shape[1]), whole.y.dtype)

    def _part(self, number: int) -> RoundOfCombine:
        handle, request = self.handles[number], self.request
        used_by_stream(self.exchange, handle)
        first, last = range_of(self.handles, number)
        columns = request.topk_weights
        if columns is not None and handle.layout == "rank" and len(self.handles) > 1:
            columns = columns.index_select(0, handle.positions[:, 0])
        parts = {
            name: _range(getattr(request, name), first, last) for name in ("bias", "topk_idx", "source_weights")
        }  # fmt: skip
        request = dataclasses.replace(
            request, handle=handle, topk_weights=columns, out=self.whole.made[first:last], **parts
        )
        return RoundOfCombine(self.buffer, request, self.call.own_rounds)

    def _join(self) -> Any:
        columns = None
        if self.parts[0].out_columns is not None:
            with self.exchange.on_stream():
                columns = torch.cat([part.out_columns for part in self.parts])
        out = self.whole.made
        self.event = self.exchange.hand_out(out, columns, ordered=self.ordered)
        return out if columns is None else (out, columns)
