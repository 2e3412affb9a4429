"""The methods that are compared: moe_comm, and what one would use without it.

- `MoeComm`: `Buffer.dispatch` and `Buffer.combine`, over shared memory or, as pretend nodes, a fabric. Layout "rank":
  rows (token, rank), combine adds them. Layout "expert": rows (token, expert) grouped by expert, weighted combine.
- `GlooProgram`: the program that one writes with `torch.distributed.all_to_all_single`: sort by expert, exchange
  counts, exchange rows (token, expert); back; weighted `index_add_`. Its rows arrive by (source, expert) and stay so,
  which is less than layout "expert" does. It moves K rows for each token where moe_comm moves one per rank.
- `MpiAlltoallv`: bare `MPI_Alltoallv` of rows that are already packed, one per (token, rank); counts known; no
  unpacking: the bytes of a dispatch and nothing else.
- `CopyFloor` (floor.py): the same rows copied by a C++ loop.
- `DeepEp`: the real one, GPU tensors, where it can be imported.

A method is made for one case, checked against `moe_comm.reference`, and measured by the loops it offers.
"""

import abc
import dataclasses
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

import moe_comm
from moe_comm import reference

from .protocol import BenchError, Case, Loop

NUM_COLUMNS = 96  # of a row are compared with the reference: every column has the same way


@dataclasses.dataclass
class Setting:
    """One rank's part of a case, and what the reference says about some of its columns."""

    case: Case
    rank: int
    group: moe_comm.EPGroup
    x: Tensor
    topk_idx: Tensor
    topk_weights: Tensor
    columns: Tensor  # [C] which columns
    reference: dict[str, reference.ReferenceDispatched]  # by layout, of these columns

    @classmethod
    def make(cls, case: Case, rank: int, group: moe_comm.EPGroup) -> "Setting":
        x = case.tokens_of(rank)
        columns = torch.linspace(0, case.hidden - 1, min(NUM_COLUMNS, case.hidden)).long().unique()
        xs = group.gather(x[:, columns])
        idx = [route[0] for route in case.routes]
        weights = [route[1] for route in case.routes]
        wanted: dict[str, reference.ReferenceDispatched] = {
            "rank": reference.dispatch(xs, idx, weights, case.experts, "rank"),
            "expert": reference.dispatch(xs, idx, weights, case.experts, "expert"),
        }
        topk_idx, topk_weights = case.routes[rank]
        return cls(case, rank, group, x, topk_idx, topk_weights, columns, wanted)

    def scale(self, rank: int) -> float:
        """The check's "expert": rows times a number that tells ranks apart."""
        return 1 + rank / 8

    def combined(self, layout: str, weighted: bool, node_of: list[int] | None = None) -> Tensor:
        """What a combine of scaled rows gives this rank, in the columns."""
        wanted = self.reference[layout]
        ys = [x * self.scale(r) for r, x in enumerate(wanted.x)]
        weights = wanted.topk_weights if weighted else None
        return reference.combine(ys, wanted.bookkeeping, weights, node_of=node_of).x[self.rank]


def same(label: str, what: str, got: Tensor, expected: Tensor, tolerance: float = 0.0) -> None:
    """Raises BenchError unless equal, bit for bit or within `tolerance` of the largest value."""
    if got.shape != expected.shape:
        raise BenchError(
            f"{label}: {what}: expected shape {tuple(expected.shape)}, got {tuple(got.shape)}"
        )
    if tolerance == 0.0 and torch.equal(got, expected):
        return
    error = (got.double() - expected.double()).abs().max() if got.numel() else torch.zeros(())
    if not error <= tolerance * expected.double().abs().max():
        raise BenchError(f"{label}: {what}: differs from the reference by up to {float(error):g}")


class Method(abc.ABC):
    """One way to dispatch and combine. `facts` go into the JSON line."""

    label = ""
    facts: dict[str, Any]

    @abc.abstractmethod
    def check(self) -> None:
        """Compares with the reference. Collective. Raises BenchError."""

    @abc.abstractmethod
    def loops(self) -> list[Loop]:
        """What can be measured; operations dispatch, combine, both, and the halves."""

    def close(self) -> None:  # noqa: B027  # most hold nothing
        """Frees what was made."""


class Steps(Method):
    """A method that is a dispatch, which leaves what it received in `rows`, and a combine of such rows."""

    rows: Any = None

    @abc.abstractmethod
    def dispatch(self) -> None:
        """Leaves what was received in `rows`."""

    @abc.abstractmethod
    def combine(self, y: Any) -> Any:
        """Returns `y`, which is as `rows`, to the sources and adds it there."""

    def loops(self) -> list[Loop]:
        self.dispatch()

        def combine() -> None:
            self.combine(self.rows)

        return [
            Loop(self.label, ("dispatch",), (self.dispatch,)),
            Loop(self.label, ("combine",), (combine,)),
            Loop(self.label, ("both",), (self.dispatch, combine)),
        ]


class MoeComm(Method):
    """`transport`: as Buffer takes it. `ranks_per_node`: 0 for real nodes."""

    def __init__(self, setting: Setting, transport: str, ranks_per_node: int, layout: str):
        self.setting, self.layout = setting, layout
        case = setting.case
        self.buffer = moe_comm.Buffer(
            setting.group, hidden=case.hidden, topk=case.topk, num_experts=case.experts,
            dtype=case.dtype, max_tokens=max(1, case.tokens), transport=transport,
            ranks_per_node=ranks_per_node,
        )  # fmt: skip
        nodes = self.buffer.topology.num_nodes
        kind = transport.partition(";")[0]
        self.label = f"moe_comm {kind}" + (f" {nodes} nodes" if nodes > 1 else "")
        self.label += " expert" if layout == "expert" else ""
        self.facts = {
            "method": "moe_comm", "backend": self.buffer.engine.transport, "nodes": nodes,
            "hops": self.buffer.hops, "layout": layout, "capacity": self.buffer.layout.capacity,
        }  # fmt: skip
        self.held: Any = None

    def _dispatch(self, **options: Any) -> Any:
        s = self.setting
        return self.buffer.dispatch(
            s.x,
            s.topk_idx,
            s.topk_weights,
            num_experts=s.case.experts,
            layout=self.layout,
            **options,
        )

    def _combine(self, y: Tensor, dispatched: moe_comm.Dispatched, **options: Any) -> Any:
        weights = dispatched.topk_weights if self.layout == "expert" else None
        return self.buffer.combine(y, dispatched.handle, weights=weights, **options)

    def check(self) -> None:
        s = self.setting
        expected = s.reference[self.layout]
        got = self._dispatch()
        same(self.label, "dispatch", got.x[:, s.columns], expected.x[s.rank])
        assert expected.topk_idx is not None and expected.topk_weights is not None
        same(self.label, "topk_idx", got.topk_idx, expected.topk_idx[s.rank])
        same(self.label, "topk_weights", got.topk_weights, expected.topk_weights[s.rank])
        y = self._combine(got.x * s.scale(s.rank), got)
        node_of = list(self.buffer.topology.node_of)
        weighted = self.layout == "expert"
        same(self.label, "combine", y[:, s.columns], s.combined(self.layout, weighted, node_of))

    def loops(self) -> list[Loop]:
        ready = self._dispatch()

        def dispatch() -> None:
            self.held = self._dispatch()

        def combine_same() -> None:
            self.held = self._combine(ready.x, ready)

        def combine() -> None:
            self.held = self._combine(self.held.x, self.held)

        loops = [
            Loop(self.label, ("dispatch",), (dispatch,)),
            Loop(self.label, ("combine",), (combine_same,)),
            Loop(self.label, ("both",), (dispatch, combine)),
        ]
        if self.setting.case.tokens > self.buffer.layout.capacity:
            return loops  # a call with a hook is one round

        def send_dispatch() -> None:
            self.held = self._dispatch(async_op="hook")

        def send_combine() -> None:
            self.held = self._combine(ready.x, ready, async_op="hook")

        def receive() -> None:
            self.held()

        for name, send in (("dispatch", send_dispatch), ("combine", send_combine)):
            loops.append(Loop(self.label, (f"{name}_send", f"{name}_receive"), (send, receive)))
        return loops

    def close(self) -> None:
        self.held = None
        self.buffer.close()


class GlooProgram(Steps):
    label = "gloo"

    def __init__(self, setting: Setting):
        case = setting.case
        if case.experts % case.num_ranks:
            raise BenchError("all_to_all_single: the program needs E to be a multiple of R")
        self.setting = setting
        self.facts = {"method": "gloo", "backend": "gloo tcp", "layout": "source, expert"}

    def dispatch(self) -> None:
        s, R = self.setting, self.setting.case.num_ranks
        flat = s.topk_idx.flatten()
        self.order = flat.argsort(stable=True)
        counts = torch.bincount(flat, minlength=s.case.experts)
        self.received_counts = torch.empty_like(counts)
        dist.all_to_all_single(self.received_counts, counts)
        self.sends = counts.view(R, -1).sum(1).tolist()
        self.receives = self.received_counts.view(R, -1).sum(1).tolist()
        self.tokens = self.order // s.case.topk
        rows = s.x[self.tokens]
        self.rows = rows.new_empty(sum(self.receives), s.case.hidden)
        dist.all_to_all_single(self.rows, rows, self.receives, self.sends)

    def combine(self, y: Tensor) -> Tensor:
        s = self.setting
        back = y.new_empty(len(self.order), s.case.hidden)
        dist.all_to_all_single(back, y, self.sends, self.receives)
        weights = s.topk_weights.flatten()[self.order].to(y.dtype)
        out = torch.zeros_like(s.x)
        return out.index_add_(0, self.tokens, back * weights[:, None])

    def check(self) -> None:
        s = self.setting
        self.dispatch()
        local = torch.arange(s.case.local_experts).repeat(s.case.num_ranks)
        by_expert = local.repeat_interleave(self.received_counts).argsort(stable=True)
        expected = s.reference["expert"].x[s.rank]
        same(self.label, "dispatch", self.rows[by_expert][:, s.columns], expected)
        out = self.combine(self.rows * s.scale(s.rank))[:, s.columns]
        same(
            self.label, "combine", out, s.combined("expert", True), 2**-6
        )  # it adds K terms in bf16


class MpiAlltoallv(Method):
    """Needs ranks that mpiexec started (launch.py). Rank numbers are MPI's."""

    label = "mpi"

    def __init__(self, setting: Setting):
        from mpi4py import MPI

        s = self.setting = setting
        self.world = MPI.COMM_WORLD
        if (self.world.size, self.world.rank) != (s.case.num_ranks, s.rank):
            raise BenchError(f"MPI counts other ranks: {self.world.rank} of {self.world.size}")
        owners = s.topk_idx // s.case.local_experts
        tokens = [(owners == r).any(1).nonzero()[:, 0] for r in range(s.case.num_ranks)]
        self.packed = s.x[torch.cat(tokens)]
        counts = [len(t) * s.case.row_bytes for t in tokens]
        received = [column[s.rank] for column in s.group.gather(counts)]
        self.rows = s.x.new_empty(sum(received) // s.case.row_bytes, s.case.hidden)
        self.send, self.receive = (
            [rows.view(torch.uint8).numpy(), (sizes, self._starts(sizes)), MPI.BYTE]
            for rows, sizes in ((self.packed, counts), (self.rows, received))
        )
        library = MPI.Get_library_version().splitlines()[0].rstrip("\0").replace("\t", " ")
        self.facts = {"method": "mpi", "backend": library, "layout": "rank"}

    @staticmethod
    def _starts(sizes: list[int]) -> list[int]:
        return [sum(sizes[:r]) for r in range(len(sizes))]

    def dispatch(self) -> None:
        self.world.Alltoallv(self.send, self.receive)

    def check(self) -> None:
        s = self.setting
        self.dispatch()
        same(self.label, "dispatch", self.rows[:, s.columns], s.reference["rank"].x[s.rank])

    def loops(self) -> list[Loop]:
        return [Loop(self.label, ("dispatch",), (self.dispatch,))]


class DeepEp(Steps):
    """DeepEP's own `Buffer` inside one NVLink domain, normal mode. Its tensors are on GPUs: the
    case's tokens are copied there first, and each part ends with a synchronisation of the device. Not tried in this
    repository's own runs, which had no GPU: take its figures with the care that the check's passing deserves."""

    label = "deep_ep"

    def __init__(self, setting: Setting):
        import deep_ep

        s = self.setting = setting
        torch.cuda.set_device(s.rank % torch.cuda.device_count())
        self.x, self.topk_idx = s.x.cuda(), s.topk_idx.cuda()
        self.topk_weights = s.topk_weights.cuda()
        self.buffer = deep_ep.Buffer(dist.group.WORLD, int(2e9), 0)
        self.facts = {"method": "deep_ep", "device": torch.cuda.get_device_name(), "layout": "rank"}

    def dispatch(self) -> None:
        b = self.buffer
        per_rank, per_node, per_expert, in_rank, _ = b.get_dispatch_layout(
            self.topk_idx, self.setting.case.experts
        )
        self.rows, *_, self.handle, _ = b.dispatch(
            self.x, num_tokens_per_rank=per_rank, num_tokens_per_rdma_rank=per_node,
            is_token_in_rank=in_rank, num_tokens_per_expert=per_expert, topk_idx=self.topk_idx,
            topk_weights=self.topk_weights,
        )  # fmt: skip
        torch.cuda.synchronize()

    def combine(self, y: Tensor) -> Tensor:
        out = self.buffer.combine(y, self.handle)[0]
        torch.cuda.synchronize()
        return out

    def check(self) -> None:
        s = self.setting
        self.dispatch()
        same(self.label, "dispatch", self.rows.cpu()[:, s.columns], s.reference["rank"].x[s.rank])
        out = self.combine(self.rows * s.scale(s.rank)).cpu()[:, s.columns]
        same(self.label, "combine", out, s.combined("rank", False), 2**-7)
