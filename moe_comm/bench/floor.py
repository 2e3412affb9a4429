"""The floor: the same rows copied by a C++ loop (bench/copy_floor.cpp), by as many processes at the same time.

No routing, no headers, no allocation, no Python between copies: tables of who goes where are made before the clock
runs. What is left are the bytes that any exchange over shared memory must move: dispatch reads x, writes the peers'
windows and copies them out; combine writes results into the sources' windows, which add them in fp32. One barrier in
each.
"""

import ctypes
import mmap
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .compile import compile_cpp
from .methods import Setting, Steps, same

SOURCE = Path(__file__).parents[2] / "bench" / "copy_floor.cpp"
FLAGS = ("-O3", "-std=c++20", "-fPIC", "-ffp-contract=off")


def compile_floor() -> Path:
    """Path of the library. Raises BenchError where it cannot be made."""
    return compile_cpp([SOURCE], FLAGS, ["-shared"])


class _Tables(ctypes.Structure):
    """copy_floor.cpp: Tables."""

    _fields_ = [
        *((name, ctypes.c_int64) for name in ("rank", "ranks", "tokens", "items", "slot_bytes")),
        *(
            (name, ctypes.c_void_p)
            for name in (
                "bases", "send_starts", "send_tokens", "receive_starts", "place_starts", "places",
                "place_weights", "term_starts", "term_ranks", "term_rows", "x", "rows", "out",
            )
        ),
    ]  # fmt: skip


class CopyFloor(Steps):
    def __init__(self, setting: Setting, layout: str):
        self.setting = s = setting
        case = s.case
        self.label = "floor" + (" expert" if layout == "expert" else "")
        self.layout = layout
        self.facts = {"method": "floor", "backend": "C++ loop", "layout": layout}
        self.library = ctypes.CDLL(str(compile_floor()))
        self.expected = s.reference[layout]
        owners = [idx // case.local_experts for idx, _ in case.routes]
        sent = [
            [(owner == r).any(1).nonzero()[:, 0] for r in range(case.num_ranks)] for owner in owners
        ]  # [source][reader] tokens
        widest = max(len(tokens) for of_source in sent for tokens in of_source)
        slot_bytes = -(-widest * case.row_bytes // 4096) * 4096
        self.rows = s.x.new_empty(self.expected.x[s.rank].shape[0], case.hidden)
        self.out = torch.empty_like(s.x)
        self.held: list[Tensor] = [s.x, self.rows, self.out]
        self.tables = _Tables(
            rank=s.rank, ranks=case.num_ranks, tokens=case.tokens, items=case.hidden,
            slot_bytes=slot_bytes, x=s.x.data_ptr(), rows=self.rows.data_ptr(),
            out=self.out.data_ptr(),
        )  # fmt: skip
        self._fill(sent)
        self._map(4096 + 2 * case.num_ranks * slot_bytes)

    def _keep(self, name: str, values: Tensor) -> None:
        values = values.contiguous()
        self.held.append(values)
        setattr(self.tables, name, values.data_ptr())

    def _fill(self, sent: list[list[Tensor]]) -> None:
        """`sent`: [source][reader] tokens, ascending."""
        s, ranks = self.setting, range(self.setting.case.num_ranks)
        self._keep("send_tokens", torch.cat(sent[s.rank]))
        self._keep("send_starts", _starts(torch.tensor([len(sent[s.rank][r]) for r in ranks])))
        self._keep("receive_starts", _starts(torch.tensor([len(sent[r][s.rank]) for r in ranks])))
        if self.layout == "expert":  # a row's places: where its copies lie in y
            copies = self.expected.bookkeeping.copies[s.rank]
            counts = copies.token.unique_consecutive(return_counts=True)[1]
            self._keep("place_starts", _starts(counts))
            self._keep("places", copies.row)
            assert self.expected.topk_weights is not None
            self._keep("place_weights", self.expected.topk_weights[s.rank][copies.row])
        row_of = torch.full((s.case.tokens, len(ranks)), -1)
        for r in ranks:
            row_of[sent[s.rank][r], r] = torch.arange(len(sent[s.rank][r]))
        token, rank = (row_of >= 0).nonzero(as_tuple=True)
        self._keep("term_starts", _starts(torch.bincount(token, minlength=s.case.tokens)))
        self._keep("term_ranks", rank)
        self._keep("term_rows", row_of[token, rank])

    def _map(self, num_bytes: int) -> None:
        """One segment for each rank: 4096 bytes of words for the barrier, then slots [R][2 banks]."""
        s = self.setting
        own = os.memfd_create("moe_comm:floor")
        os.ftruncate(own, num_bytes)
        names = s.group.gather(f"/proc/{os.getpid()}/fd/{own}")
        self.maps = []
        for name in names:
            fd = os.open(name, os.O_RDWR)
            self.maps.append(mmap.mmap(fd, num_bytes))
            os.close(fd)
        s.group.gather(None)  # everybody has opened it
        os.close(own)
        addresses = [ctypes.addressof(ctypes.c_char.from_buffer(m)) for m in self.maps]
        self._keep("bases", torch.tensor(addresses))

    def dispatch(self) -> None:
        self.library.floor_dispatch(ctypes.byref(self.tables))

    def combine(self, y: Any = None) -> None:
        """Of `rows`, where they lie."""
        self.library.floor_combine(ctypes.byref(self.tables))

    def check(self) -> None:
        s = self.setting
        self.dispatch()
        same(self.label, "dispatch", self.rows[:, s.columns], self.expected.x[s.rank])
        self.rows *= s.scale(s.rank)
        self.combine()
        expected = s.combined(self.layout, self.layout == "expert")
        same(self.label, "combine", self.out[:, s.columns], expected)


def _starts(counts: Tensor) -> Tensor:
    return torch.cat([torch.zeros(1, dtype=torch.int64), counts.cumsum(0)])
