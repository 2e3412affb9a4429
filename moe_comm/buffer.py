"""Buffer: the public object of an expert-parallel group. Checks, keeps the order of calls, delegates.

How an exchange works (the rest is in dispatch.py, combine.py, csrc/exchange.hpp):

- **One row per (token, node), then one per (token, rank).** hops="node": a token crosses the network once for each node
  that holds one of its experts, to the rank of its own local index there (the rail peer), which passes it on by shared
  memory; results are added on the way back. hops="rank": every pair of ranks on different nodes is linked directly.
- **Epochs, banks, credits.** Each round of each call has a number, the epoch, in the order of calls, which is the same
  on all ranks. Each window exists twice, for even and odd epochs; a bank of epoch e may be written when its reader has
  released e - 2. Counters only grow; nobody resets what another may still read.
- **The network promises no order.** Each write carries an immediate; the receiver counts them.
- **Failure.** Wrong input raises on every rank and the next call works. A lost or late peer ends the Buffer: the first
  fault is kept, and every later call raises it. Each round needs a header of every rank, so the round in which a rank
  was lost, or the next, raises on all survivors; one that has all of its own rows first returns them, whole and right
  (to hold them back until all others have theirs would be one more wait between nodes in every call).
"""

import contextlib
import threading
import weakref
from collections.abc import Callable, Collection
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from . import lifetime
from ._engine import CallFormat
from .arguments import Found, device_named, wrong
from .combine import CombineRequest, PendingCombine
from .config import Config
from .dispatch import DispatchRequest, PendingDispatch
from .errors import ArgumentError, ClosedError, MoeCommError, PeerLost, PeerTimeout, TransportError
from .event import Event, Hook
from .exchange import all_or_none, open_exchange
from .generation import meet
from .group import EPGroup, survey
from .handle import HOPS, Handle
from .layout import RowFormat, WindowLayout
from .staging import staged

CLOSE_TIMEOUT_S = 5.0
UNREFERENCED_TIMEOUT_S = 1.0  # of a Buffer that nobody closed
MAX_UNHOOKED = 2

if TYPE_CHECKING:
    from .kernel_exchange import KernelExchange

_buffers: "weakref.WeakValueDictionary[str, Buffer]" = weakref.WeakValueDictionary()


class Buffer:
    """Windows, connections and the exchange sequence of one EP group. Making one is collective, so is every call.

    Args:
        group: a torch ProcessGroup (any backend), None (the default group), or an `EPGroup`.
        hidden, topk, num_experts, dtype: the largest rows expected; they choose C for the window budget. Other shapes
            work as well, with a C of their own.
        max_tokens: M, the most tokens a rank ever passes; needed by hooks and by layout "padded".
        window_bytes: memory for windows (default: MOE_COMM_WINDOW_BYTES, 512 MB).
        hops: "node" or "rank", see above.
        transport: "auto", "shm", "fabric:tcp;ofi_rxm", "fabric:efa", … (MOE_COMM_TRANSPORT).
        ranks_per_node: pretend nodes of so many consecutive ranks (MOE_COMM_RANKS_PER_NODE); 0: ask the machines.
        timeout_s: until a live but late peer is an error (MOE_COMM_TIMEOUT_S, 300); also bounds MOE_COMM_SILENCE_S.
        name: for `torch.library` ops, which know a Buffer by it; default unique in this process.
        each_copy: windows for max_tokens tokens hold a row for each of their copies, so that `combine(each_copy=True)`
            is one round, too.
        mask_lost: a rank that is lost or late is masked and the call goes on without it: it has no tokens, tokens for
            its experts are dropped, what it owed is left out of sums. Each rank masks for itself; a rank that others
            masked is told, and masks them in its next call. Needs hops="rank" and max_tokens that fit one round.
        device: "cuda": calls take tensors of that GPU alone, and kernels read and write the windows
            (kernel_exchange.py). With max_tokens that fit one round nothing waits for the host, but where exact sizes
            are asked for; else calls take as many rounds as they need, and ask in each. None (or MOE_COMM_DEVICE): CPU
            tensors, and CUDA tensors by copies (staging.py).
        num_sms: with a device, how many SMs a call's kernels take at most, but for a few small ones that number rows;
            0: all (MOE_COMM_NUM_SMS). Each rank for itself; the attribute of this name may be set between calls.
        windows: with a device, where they lie: "device", "host", or "auto", which is "device" if every rank can
            (MOE_COMM_WINDOWS; window_memory.py).
        rejoin: this process takes a dead rank's place: waits until the others `recover(expect=[rank])`.

    Raises: MismatchError if ranks pass different parameters; ArgumentError; TransportError with the reason.
    Blocks while it is made. One thread calls at a time (others wait). Source: DeepEP's Buffer; the interface is ours.
    """

    def __init__(
        self,
        group: Any = None,
        *,
        hidden: int = 7168,
        topk: int = 8,
        num_experts: int = 256,
        dtype: torch.dtype = torch.bfloat16,
        max_tokens: int | None = None,
        window_bytes: int | None = None,
        hops: str = "node",
        transport: str | None = None,
        interface: str | None = None,
        ranks_per_node: int | None = None,
        timeout_s: float | None = None,
        name: str | None = None,
        each_copy: bool = False,
        mask_lost: bool = False,
        rejoin: bool = False,
        device: torch.device | str | None = None,
        windows: str | None = None,
        num_sms: int | None = None,
    ):
        self._end: str | None = "was never opened"  # why it cannot be used
        if hops not in HOPS:
            raise wrong("hops", f"one of {HOPS}", hops)
        self.group = EPGroup.of(group)
        self.config = Config.resolve(
            window_bytes=window_bytes, transport=transport, interface=interface, ranks_per_node=ranks_per_node,
            timeout_s=timeout_s, device=None if device is None else str(device), windows=windows,
            num_sms=num_sms,
        )  # fmt: skip
        self.device = device_named(self.config.device)
        self.num_sms = self.config.num_sms
        self.kernels: KernelExchange | None = None
        self.max_tokens = max_tokens
        if mask_lost and (hops != "rank" or max_tokens is None):
            raise wrong("mask_lost", 'False without hops="rank" and max_tokens', mask_lost)
        self._hops, self.mask_lost = hops, mask_lost
        self.rows_per_token = min(topk, -(-num_experts // self.group.num_ranks)) if each_copy else 1
        self._home: tuple[int, ...] | None = None  # node_of of the last generation
        self._sizes = (hidden, topk, num_experts, dtype)
        self._agreed = {
            "hidden": hidden, "topk": topk, "num_experts": num_experts, "dtype": str(dtype), "hops": hops,
            "max_tokens": max_tokens, "mask_lost": mask_lost, "each_copy": each_copy,
            "window_bytes": self.config.window_bytes, "transport": self.config.transport,
            "ranks_per_node": self.config.ranks_per_node, "first_epoch": self.config.first_epoch,
            "device": self.device.type if self.config.device else "",
            "windows": self.config.windows if self.config.device else "",
        }  # fmt: skip
        if windows is not None and not self.config.device:
            raise wrong("windows", "None without a device", windows)
        self._lock = threading.RLock()
        self._unhooked: list[tuple[PendingDispatch | PendingCombine, Hook]] = []
        self._counts = {"dispatches": 0, "combines": 0, "rounds": 0}
        self.generation = 0
        self.serial = self.group.num_buffers + 1
        self.name = name or f"{self.group.name}/{self.serial}/{self.rank}"
        if rejoin:
            self._meet((), (), joining=True, timeout_s=self.config.timeout_s)
        else:
            self._open(self.group, (False,) * self.group.num_ranks)
        self.group.num_buffers = self.serial
        self._end = None
        _buffers[self.name] = self
        lifetime.opened(self)

    def _open(self, group: EPGroup, absent: tuple[bool, ...]) -> None:
        """Windows and connections of a generation: collective of those present."""
        hidden, topk, num_experts, dtype = self._sizes
        found = survey(group, self.config.ranks_per_node, self._agreed, self._home)
        # Without all ranks of a node its rails are broken: pairs are linked directly.
        hops = "rank" if any(absent) else self._hops
        row = RowFormat.of_dispatch(hidden * dtype.itemsize, 0, topk, weights=True)
        nodes = found.topology.num_nodes
        layout = WindowLayout.for_budget(
            group.num_ranks, nodes, hops, window_bytes=self.config.window_bytes, row_bytes=row.row_bytes,
            num_experts=num_experts,
        )  # fmt: skip
        rows = None if self.max_tokens is None else max(1, self.max_tokens * self.rows_per_token)
        if rows is not None and rows < layout.capacity:
            layout = WindowLayout.for_rows(
                group.num_ranks, nodes, hops, capacity=rows, row_bytes=row.row_bytes, num_experts=num_experts
            )  # fmt: skip
        opened = open_exchange(
            group, self.config, hops, found, layout, absent, self.mask_lost, self.device if self.config.device else None
        )  # fmt: skip
        self.hops, self.layout = hops, layout
        self.engine, self.native, self.topology = opened.engine, opened.native, opened.topology
        self.window_memory, self._apart = opened.windows, opened.apart
        self._home = self.topology.node_of
        self.group_key = group.secret
        self.formats: dict[tuple, CallFormat] = {}  # by shapes and dtypes: dispatch.py, combine.py
        if self.config.device:
            from . import kernel_exchange  # device code is loaded where it is asked for

            self.kernels, _ = all_or_none(
                group,
                "kernels",
                lambda: kernel_exchange.opened(self, opened.native),
                lambda made: None,
            )

    # --- what it is ----------------------------------------------------------------------------------

    @property
    def rank(self) -> int:
        return self.group.rank

    @property
    def num_ranks(self) -> int:
        return self.group.num_ranks

    @property
    def window_bytes(self) -> int:
        """Bytes of all windows: 2·(R + 2(N-1))·C·row for hops="node", 2·(2R - G)·C·row for hops="rank"."""
        return self.layout.window_bytes

    @property
    def windows(self) -> str:
        """The memory they lie in: "host", "device", or "device in a node" with those of the network in the host's."""
        return {"": "host", "near": "device in a node", "all": "device"}[self._apart]

    def __repr__(self) -> str:
        t = self.topology
        return (
            f"Buffer({self.name!r}, rank {self.rank} of {self.num_ranks}, {t.num_nodes} nodes of {t.node_ranks}, "
            f"hops={self.hops!r}, transport {self.engine.transport!r}, C={self.layout.capacity})"
        )

    def stats(self) -> dict[str, int]:
        """Counted at this rank since the Buffer was made: calls (a backward's too), rounds, payload rows and bytes
        stored inside the node (`_local`) and written to other nodes (`_link`), and messages to other nodes (`writes`).
        """
        return {**self._counts, **self.native.stats()}

    def timeouts(self, timeout_s: float | None) -> tuple[float, float]:
        """(late, silent) in seconds for one call."""
        late = self.config.timeout_s if timeout_s is None else timeout_s
        return late, min(late, self.config.silence_s)

    def padded_capacity(self, capacity: int | None) -> int:
        """Rows per expert of the padded layout: as given, else R * max_tokens, which always suffices."""
        if capacity is not None:
            return capacity
        if not (self.max_tokens is not None):
            raise wrong("capacity", "an int, or a Buffer with max_tokens", None)
        return self.num_ranks * (self.max_tokens or 0)

    @property
    def num_sms(self) -> int:
        return self._num_sms

    @num_sms.setter
    def num_sms(self, num_sms: int) -> None:
        if not (isinstance(num_sms, int) and num_sms >= 0):
            raise wrong("num_sms", "an int >= 0", num_sms)
        self._num_sms = num_sms

    # --- calls ---------------------------------------------------------------------------------------

    @staged("x", fills=("out",), updates=("wait_ns",))
    def dispatch(
        self,
        x: Any,
        topk_idx: Tensor | None = None,
        topk_weights: Tensor | None = None,
        *,
        num_experts: int = 0,
        layout: str = "rank",
        alignment: int = 1,
        handle: Handle | None = None,
        capacity: int | None = None,
        max_tokens: int | None = None,
        wait_ns: Tensor | None = None,
        out: Any = None,
        async_op: str | None = None,
        timeout_s: float | None = None,
    ) -> Any:
        """Sends each token to the ranks that own its experts. Not differentiable; see `moe_comm.dispatch`.

        Args:
            x: [T, H], any dtype, H·itemsize a multiple of 16, rows contiguous; or a pair (payload, scales [T, S])
                with scales in any strides. T may differ from rank to rank and be 0. On the CPU or on a GPU
                (staging.py): all tensors are where x is, the results too, ordered on its current stream; the handle's
                tables are on the host.
            topk_idx: [T, K] int64 expert ids in [0, num_experts), −1: none; no id twice in a row.
            topk_weights: [T, K] float32, or None.
            num_experts: E; expert e lives on rank e // ceil(E / R).
            layout, alignment, capacity: see `Dispatched`.
            handle: of an earlier dispatch: the same routing again (topk_idx, topk_weights and num_experts omitted).
            max_tokens: of any rank in this call: all ranks raise MismatchError where one has more.
            out: layout "padded": dense memory for x, or a pair, to be written to; rows behind the counts are undefined.
            wait_ns: int64 [R]; how long this call (or its hook) waited for the first rows of each rank is added to it,
                in nanoseconds: who is slow? (hops="node": who, or who passes its rows on)
            async_op: None; "event": returns (Dispatched, Event); "hook": only sends, returns a `Hook` whose
                `hook.result` is the Dispatched after it was called (one round: needs max_tokens <= C; at most two such
                calls may be open).
            timeout_s: instead of the Buffer's.

        Returns: Dispatched. Raises: ArgumentError (the others: PeerError), MismatchError, PeerTimeout, PeerLost.
        Blocks until all ranks called. x may be changed once the call returned; with a device and "event", behind it.
        """
        request = DispatchRequest(
            x, topk_idx, topk_weights, num_experts, layout, alignment, handle, capacity, timeout_s, async_op == "hook",
            max_tokens, wait_ns, out,
        )  # fmt: skip
        return self._run(self._calls()[0], request, "dispatches", async_op)

    @staged("y", fills=("out",), updates=("wait_ns",))
    def combine(
        self,
        y: Tensor,
        handle: Handle,
        *,
        weights: Tensor | None = None,
        topk_weights: Tensor | None = None,
        bias: Tensor | None = None,
        out: Tensor | None = None,
        topk_idx: Tensor | None = None,
        each_copy: bool = False,
        source_weights: Tensor | None = None,
        wait_ns: Tensor | None = None,
        async_op: str | None = None,
        timeout_s: float | None = None,
    ) -> Any:
        """Returns each token's results to its source and adds them. Not differentiable; see `moe_comm.combine`.

        Args:
            y: as `Dispatched.x` of the handle's dispatch ([rows, H], [P, H] or [L, capacity, H]); bfloat16, float16,
                float32 or float64; H may differ from the dispatch's.
            handle: of the dispatch; may be used more than once.
            weights: float32, y's shape without H: each copy is multiplied by its weight (layouts "expert", "padded").
            topk_weights: float32 columns, added without rounding: [rows, K] (layout "rank") or y's shape without H.
            bias: [T, H], where the sum starts.
            out: [T, H] to write into; not y's memory.
            topk_idx: int64 [T, K], the dispatch's: sums go by its lanes instead of by ranks (hops="rank", or one node).
            each_copy: one row per (token, expert) travels; the source adds them in lane order (layouts "expert",
                "padded"; needs topk_idx; without weights, topk_weights). More bytes, one rounding.
            source_weights: float32 [T, K], with each_copy: each copy is multiplied at the source, fused with the sum.
            wait_ns: as of `dispatch`.

        Returns: [T, H] of y's dtype; with topk_weights a pair ([T, H], [T, K] float32); with async_op="event" a pair of
        that and an Event; with "hook" a Hook. Order of sums: combine.py. Raises as `dispatch`.
        """
        request = CombineRequest(
            y, handle, weights, topk_weights, bias, out, topk_idx, each_copy, source_weights, timeout_s,
            async_op == "hook", wait_ns,
        )  # fmt: skip
        return self._run(self._calls()[1], request, "combines", async_op)

    def _calls(self) -> tuple[Callable[..., Any], Callable[..., Any]]:
        if self.kernels is None:
            return PendingDispatch, PendingCombine
        from . import kernel_rounds

        return kernel_rounds.dispatch_call, kernel_rounds.combine_call

    def _run(
        self, kind: Callable[..., Any], request: Any, counter: str, async_op: str | None
    ) -> Any:
        if async_op not in (None, "event", "hook"):
            raise wrong("async_op", 'None, "event" or "hook"', async_op)
        with self._lock:
            self._check_usable()
            if self.kernels is not None:
                self.kernels.num_sms = self._num_sms
            pending = kind(self, request)
            if async_op == "hook" and len(self._unhooked) >= MAX_UNHOOKED:
                pending.refuse(
                    f"async_op: expected at most {MAX_UNHOOKED} calls whose hook was not called yet, got one more: "
                    "call an earlier hook first"
                )
            self._counts[counter] += 1
            pending.ordered = async_op != "event"
            with _Faults(self):
                if async_op == "hook" and pending.error is None:
                    return self._send_hooked(pending)
                self._exchange(pending)
                result = pending.finish()
        if async_op != "event":
            return result
        event = Event()
        if self.kernels is not None:
            event._record(pending.event)
        return result, event

    def _exchange(self, pending: "PendingDispatch | PendingCombine") -> None:
        """All rounds: at most two sent ahead of the one received; the first headers say how many there are."""
        call = pending.call
        sent = received = 0
        rounds = call.own_rounds
        while received < rounds:
            while sent < rounds and sent < received + 2:
                self._make_room()
                pending.send()
                sent += 1
            if received == 0:
                pending.receive_first()
                rounds = call.num_rounds
            pending.receive(received)
            received += 1
        self._counts["rounds"] += rounds

    def require_one_round(self, capacity: int, deferred: bool) -> None:
        """Raises ArgumentError unless max_tokens fit one round, where a call relies on that."""
        if (deferred or self.mask_lost) and (self.max_tokens is None or self.max_tokens > capacity):
            raise wrong(
                "async_op" if deferred else "mask_lost",
                f"window_bytes that hold max_tokens rows (one round of {capacity} rows)",
                Found(f"max_tokens = {self.max_tokens}"),
            )

    def _make_room(self) -> None:
        """Before epoch e is sent, every receive up to e - 2 is done: a rank must not wait for a bank of its own."""
        due = (self.kernels or self.native).next_epoch - 2
        for pending, hook in list(self._unhooked):
            if pending.call.epochs[0] <= due:
                self._receive_hooked(pending, hook)

    def _send_hooked(self, pending: "PendingDispatch | PendingCombine") -> Hook:
        self._make_room()
        pending.send()
        generation = self.generation
        hook = Hook(lambda: self._call_hook(pending, hook, generation))
        self._unhooked.append((pending, hook))
        return hook

    def _call_hook(
        self, pending: "PendingDispatch | PendingCombine", hook: Hook, generation: int
    ) -> None:
        with self._lock:
            if generation != self.generation:
                raise PeerLost(
                    f"hook: its call was of generation {generation}, this is {self.generation}"
                )
            self._check_usable()
            with _Faults(self):
                self._receive_hooked(pending, hook)
                hook.result = pending.finish()

    def _receive_hooked(self, pending: "PendingDispatch | PendingCombine", hook: Hook) -> None:
        """The receive of a hooked call, once: by its hook, or earlier when its bank is needed."""
        if not any(open_hook is hook for _, open_hook in self._unhooked):
            return
        self._unhooked = [(p, h) for p, h in self._unhooked if h is not hook]
        received, rounds = 0, 1
        while (
            received < rounds
        ):  # more than one only where another rank broke the rule of one round
            if received == len(pending.call.epochs):
                self._make_room()
                pending.send()
            if received == 0:
                pending.receive_first()
                rounds = pending.call.num_rounds
            pending.receive(received)
            received += 1
        self._counts["rounds"] += rounds

    def _check_usable(self) -> None:
        if self._end:
            raise ClosedError(f"Buffer {self.name!r} {self._end}")
        self.native.raise_fault()
        if self.kernels is not None:
            with _Faults(self):
                self.kernels.raise_errors()

    # --- end -----------------------------------------------------------------------------------------

    def close(self, timeout_s: float = CLOSE_TIMEOUT_S) -> None:
        """Drains what is in flight (bounded), says goodbye to the peers, frees the windows. More than once is fine.

        A peer that still waits for this rank raises PeerLost at once.
        """
        if self._end:
            return
        with self._lock:
            self._end = "was closed"
            self._unhooked.clear()
            self._close_exchange(timeout_s)

    def _close_exchange(self, timeout_s: float) -> None:
        if self.kernels is not None:
            self.kernels.close(timeout_s)
        if self.window_memory is not None:
            self.window_memory.unmap_peers()
        self.native.close(timeout_s)
        if self.window_memory is not None:
            from .window_memory import keep_until_unused

            near = [
                r for r in range(self.num_ranks) if r != self.rank and self.topology.is_local(r)
            ]
            keep_until_unused(self.native, near, timeout_s)
            self.window_memory = None

    # --- generations ---------------------------------------------------------------------------------

    def alive(self) -> tuple[bool, ...]:
        """[R]: the ranks of this generation that are not masked. A rank that died since is found by the next call."""
        return tuple(not absent for absent in self.native.absent)

    def mask(self, rank: int) -> None:
        """This rank goes on without `rank`, as if it were lost (`mask_lost`). Not collective; undone by `recover`."""
        if not (isinstance(rank, int) and 0 <= rank < self.num_ranks and rank != self.rank):
            raise wrong("rank", f"another rank of {self.num_ranks}", rank)
        if not self.mask_lost:
            raise wrong("mask_lost", "True, to mask ranks", False)
        with self._lock:
            self.native.mask(rank)

    def recover(
        self, *, mask: Collection[int] = (), expect: Collection[int] = (), timeout_s: float = 10.0
    ) -> tuple[bool, ...]:
        """Begins the next generation, of the ranks that come; collective of those that are left.

        Waits at most `timeout_s` for the ranks of this generation that this rank does not take for lost, and for those
        in `expect`: who rejoins; and, after a link was cut and mended, who was taken for lost meanwhile (all may be
        named), or they may come too late and be left out. `mask`: ranks to leave out though they live; all pass the
        same. Afterwards calls work again: an absent rank has no tokens, tokens for its experts are dropped, and `hops`
        is "rank" until all are back. Handles and hooks of earlier generations raise. The group needs a Store that
        survives (not one that a dead rank hosted).

        Returns: `alive()`. Raises: PeerLost on a rank that the others left out (it may `rejoin`); PeerTimeout,
        TransportError if members failed meanwhile: call it again. See generation.py.
        """
        with self._lock:
            if self._end:
                raise ClosedError(f"Buffer {self.name!r} {self._end}")
            lost = self.native.lost
            waited_for = {r for r in range(self.num_ranks) if not lost[r] and r not in mask}
            self._leave_generation()
            self._meet(waited_for | set(expect), mask, joining=False, timeout_s=timeout_s)
            return self.alive()

    def rejoin(self, timeout_s: float = 300.0) -> tuple[bool, ...]:
        """On a rank that was left out: waits until the others `recover(expect=…)` and is of that generation.

        A new process in a dead rank's place makes its Buffer with `rejoin=True` instead, in the same order as the
        others made theirs. Returns: `alive()`. Raises: PeerTimeout if nobody called recover.
        """
        with self._lock:
            if self._end:
                raise ClosedError(f"Buffer {self.name!r} {self._end}")
            self._leave_generation()
            self._meet((), (), joining=True, timeout_s=timeout_s)
            return self.alive()

    def _leave_generation(self) -> None:
        self.native.fail("this rank left the generation to recover")
        self._unhooked.clear()
        self._close_exchange(0.0)

    def _meet(
        self, expected: Collection[int], mask: Collection[int], *, joining: bool, timeout_s: float
    ) -> None:
        name = f"buffer{self.serial}"
        number, members = meet(
            self.group, name, self.generation, expected=expected, masked=mask, joining=joining, timeout_s=timeout_s
        )  # fmt: skip
        group = self.group.of_members(members, f"{self.group.name}/{name}/{number}", timeout_s)
        secrets = group.gather(self.group.known_secret)
        known = [secret for secret in secrets if secret is not None]
        self.group.adopt(group, known[0])
        for engine in self.group.engines.values():
            try:
                engine.raise_fault()
            except MoeCommError:
                self.group.engines.clear()  # its proxy gave up: a new one
                break
        self._open(group, tuple(r not in members for r in range(self.num_ranks)))
        self.generation = number

    def leave_to_parent(self) -> list[object]:
        """See lifetime.py."""
        self._end = "belongs to the process this one was forked from: make another in this one"
        self._lock = threading.RLock()  # a thread of the parent may hold the old one
        return [self.native, self.engine]

    def __enter__(self) -> "Buffer":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __del__(self) -> None:
        with contextlib.suppress(MoeCommError):
            self.close(UNREFERENCED_TIMEOUT_S)


class _Faults:
    """Marks the Buffer as spent when a wait failed, so that peers learn it and every later call raises the same."""

    def __init__(self, buffer: Buffer):
        self._buffer = buffer

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: type | None, error: BaseException | None, _: object) -> None:
        if isinstance(error, (PeerTimeout, PeerLost, TransportError)) and not isinstance(
            error, ArgumentError
        ):
            self._buffer.native.fail(str(error))


def buffer_named(name: str) -> Buffer:
    """The living Buffer of this name. Raises ArgumentError if there is none."""
    found = _buffers.get(name)
    if found is None:
        raise ArgumentError(f"buffer: no living Buffer is called {name!r}")
    return found
