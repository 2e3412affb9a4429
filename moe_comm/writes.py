"""What may be written: the checks of `write`, `scatter` and `write_paged`, before anything leaves.

Each returns the entries that the binding takes (csrc/bindings.cpp, Engine.write), or raises ArgumentError naming the
argument, what was expected and what was found.
"""

import dataclasses
from collections.abc import Iterable, Sequence
from numbers import Integral
from typing import TYPE_CHECKING, Any

from torch import Tensor

from .arguments import describe
from .arguments import expect as require
from .errors import ClosedError
from .mailbox import USER_IMMEDIATES, Entry, Peer
from .region import Region, parse_descriptor

if TYPE_CHECKING:
    from .engine import TransferEngine

MAX_IMMEDIATE_BYTES = 1 << 30  # a longer write is cut, and its immediate could overtake a piece


@dataclasses.dataclass(frozen=True)
class Write:
    """One entry of a `scatter`; fields as the arguments of `TransferEngine.write`."""

    peer: Peer
    region: Region
    descriptor: bytes
    local_offset: int = 0
    remote_offset: int = 0
    num_bytes: int | None = None
    imm: int | None = None


@dataclasses.dataclass(frozen=True)
class Pages:
    """One side of a paged write: page p begins at offset + stride * p."""

    side: str  # "src" or "dst"
    pages: Any
    stride: int | None  # None: the page's bytes
    offset: int


def is_int(value: Any, low: int, high: int) -> bool:
    return isinstance(value, (int, Integral)) and low <= int(value) <= high


def check_peer(engine: "TransferEngine", peer: Any, argument: str) -> None:
    good = isinstance(peer, Peer) and peer.engine is engine
    require(good, argument, "a Peer of this engine", describe(peer))
    if peer.closed:
        raise ClosedError(f"{argument}: {peer.name} was closed by this engine")


def check_target(
    engine: "TransferEngine", peer: Any, region: Any, descriptor: Any, where: str
) -> None:
    """That they belong together. `where`: prefix of the arguments' names."""
    check_peer(engine, peer, f"{where}peer")
    good = isinstance(region, Region) and region.engine is engine
    require(good, f"{where}region", "a Region of this engine", describe(region))
    require(not region.closed, f"{where}region", "an open region", "a closed one")
    mine = parse_descriptor(descriptor)[0] == peer.address.engine_id
    require(mine, f"{where}descriptor", f"a region of {peer.name}", "one of another engine")


def check_writes(engine: "TransferEngine", writes: Sequence[Write]) -> list[Entry]:
    require(len(writes) > 0, "writes", "at least one", 0)
    entries = []
    for i, w in enumerate(writes):
        where = f"writes[{i}]." if len(writes) > 1 else ""
        check_target(engine, w.peer, w.region, w.descriptor, where)
        _, remote_bytes, native = parse_descriptor(w.descriptor)
        local_bytes = w.region.num_bytes
        num_bytes = w.num_bytes
        if num_bytes is None:
            good = is_int(w.local_offset, 0, local_bytes)
            require(good, f"{where}local_offset", f"0 to {local_bytes}", w.local_offset)
            num_bytes = local_bytes - w.local_offset
        imm = _check_immediate(w.imm, num_bytes, where)
        _check_span(w.local_offset, num_bytes, local_bytes, f"{where}local_offset")
        _check_span(w.remote_offset, num_bytes, remote_bytes, f"{where}remote_offset")
        source = (w.peer.number, w.region.number, w.local_offset, num_bytes)
        entries.append((*source, native, w.remote_offset, imm))
    return entries


def check_pages(
    peer: Peer,
    region: Region,
    source: Pages,
    descriptor: bytes,
    target: Pages,
    page_bytes: int,
    imm: Any,
) -> list[Entry]:
    _, remote_bytes, native = parse_descriptor(descriptor)
    good = is_int(page_bytes, 1, region.num_bytes)
    require(good, "page_bytes", f"1 to {region.num_bytes}", page_bytes)
    sources = _places(source, page_bytes, region.num_bytes)
    targets = _places(target, page_bytes, remote_bytes)
    same = len(sources) == len(targets)
    require(same, "pages_dst", f"{len(sources)} pages, as pages_src", len(targets))
    value = _check_immediate(imm, page_bytes, "")
    number, local = peer.number, region.number
    return [
        (number, local, s, page_bytes, native, d, value)
        for s, d in zip(sources, targets, strict=True)
    ]


def _places(side: Pages, page_bytes: int, size: int) -> list[int]:
    """Where each page begins."""
    name, place = f"pages_{side.side}", "local_offset" if side.side == "src" else "remote_offset"
    stride = page_bytes if side.stride is None else side.stride
    require(is_int(stride, 0, size), f"{side.side}_stride", f"0 to {size}", stride)
    require(is_int(side.offset, 0, size), place, f"0 to {size}", side.offset)
    pages = side.pages
    if isinstance(pages, Tensor):
        good = pages.dim() == 1 and not pages.is_floating_point() and pages.device.type == "cpu"
        require(good, name, "1-D integers on the CPU", describe(pages))
        pages = pages.tolist()
    good = isinstance(pages, Iterable)
    require(good, name, "a list of page numbers", describe(pages))
    pages = list(pages)
    require(len(pages) > 0, name, "at least one page", 0)
    good = all(isinstance(page, (int, Integral)) for page in pages)
    require(good, name, "a list of page numbers", describe(pages))
    for page in (min(pages), max(pages)):
        inside = page >= 0 and side.offset + stride * page + page_bytes <= size
        require(
            inside, name, f"pages inside a region of {size} bytes", f"page {page} of {page_bytes}"
        )
    return [side.offset + stride * page for page in pages]


def _check_span(offset: Any, num_bytes: int, size: int, argument: str) -> None:
    inside = is_int(offset, 0, size) and offset + num_bytes <= size
    require(inside, argument, f"{num_bytes} bytes inside a region of {size}", f"offset {offset}")


def _check_immediate(imm: Any, num_bytes: Any, where: str) -> int:
    """As the binding wants it: -1 for none."""
    good = is_int(num_bytes, 0, 1 << 62)
    require(good, f"{where}num_bytes", "an int >= 0, or None", num_bytes)
    if imm is None:
        return -1
    require(is_int(imm, 0, USER_IMMEDIATES - 1), f"{where}imm", "0 to 2^30 - 1, or None", imm)
    fits = num_bytes <= MAX_IMMEDIATE_BYTES
    require(fits, f"{where}num_bytes", "at most 2^30 with an immediate", num_bytes)
    return imm
