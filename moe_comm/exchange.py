"""How a Buffer's ranks find each other: from an EPGroup to an open Exchange (csrc/exchange.hpp).

Four gathers: what everybody passed and a probe segment; who can map whom; segments, regions, addresses and immediate
rows; and whether every connection stands. On several hosts one more, to choose a fabric; over tcp one or two more, to
find the address of each host that the others can reach (source.py); over verbs and EFA one more, to take as many NICs
everywhere (nics.py). Each error is gathered, too, so that all ranks raise together.
"""

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import torch

from . import _engine
from .config import Config
from .errors import MoeCommError, PeerTimeout, TransportError
from .group import EPGroup, Survey, Topology
from .layout import WindowLayout
from .nics import agreed_interface
from .source import reachable_address

CONNECT_TIMEOUT_S = 30.0
FABRICS = ("fabric:efa", "fabric:verbs;ofi_rxm", "fabric:tcp;ofi_rxm")  # best first


@dataclasses.dataclass
class OpenExchange:
    """One rank's end. `native` is moe_comm._engine.Exchange; the engine is shared with the group's other Buffers."""

    engine: _engine.Engine
    native: _engine.Exchange
    topology: Topology
    windows: Any = None  # memory of a device (window_memory.py)
    apart: str = ""  # which of them lie there: layout.py


def choose_transport(group: EPGroup, asked: str, survey: Survey) -> str:
    """`auto`: shared memory if all ranks are on one host, else the best fabric that every rank has. Collective.

    Libraries are looked for only where several hosts are: that takes 0.13 s.
    """
    if asked != "auto":
        return asked
    if survey.one_host or survey.topology.num_nodes == 1:
        return "shm"
    available = [t["name"] for t in _engine.transports() if t["available"]]
    everywhere = [names for names in group.gather(available) if names is not None]
    for name in FABRICS:
        if all(name in names for names in everywhere):
            return name
    raise TransportError(
        "no transport that every rank has reaches all hosts: install libfabric (apt-get install libfabric1) "
        "and see `moe-comm doctor`"
    )


def open_exchange(
    group: EPGroup,
    config: Config,
    hops: str,
    survey: Survey,
    layout: WindowLayout,
    absent: tuple[bool, ...] = (),
    mask_lost: bool = False,
    device: torch.device | None = None,
) -> OpenExchange:
    """Collective. Raises on every rank if one of them fails. `absent` [R]: not there; only with hops="rank". `device`:
    whose kernels are this rank."""
    topology = survey.topology
    shape = {
        "rank": group.rank, "num_ranks": group.num_ranks, "num_nodes": topology.num_nodes,
        "node_ranks": topology.node_ranks, "hops_node": hops == "node", "node_of": topology.node_of,
        "local_of": topology.local_of, "rank_of": topology.rank_of,
        "absent": absent or (False,) * group.num_ranks, "mask_lost": mask_lost,
    }  # fmt: skip
    if hops == "node":
        linked = [
            r
            for r in range(group.num_ranks)
            if topology.local_of[r] == topology.local_of[group.rank]
        ]
    else:
        linked = list(range(group.num_ranks))
    present = [r for r in range(group.num_ranks) if not absent or not absent[r]]
    linked = [r for r in linked if r in present and not topology.is_local(r)]

    transport = choose_transport(group, config.transport, survey)
    key = (transport, config.interface, config.shard_bytes, config.chaos_seed)
    interface = agreed_interface(
        group, transport, config.interface, survey.place, group.engines.get(key)
    )
    if transport.startswith("fabric:tcp"):
        interface = interface or reachable_address(group)

    near = [r for r in present if r != group.rank and topology.is_local(r)]
    windows: Any = None
    places: dict[int, int] = {}
    apart = ""
    if device is not None:
        from . import window_memory  # there is none of it where the CPU is this rank

        engine, _ = all_or_none(
            group, "opening the transport", lambda: _engine_of(group, config, transport, interface), lambda made: None
        )  # fmt: skip
        windows, places, apart = window_memory.open_window_memory(
            group, config.windows, device, layout, engine, near
        )

    def prepare() -> tuple[_engine.Engine, _engine.Exchange, dict]:
        engine = _engine_of(group, config, transport, interface)
        offsets = layout.offsets(apart)
        with _described(windows, apart == "all") as memory:
            native = _engine.Exchange(engine, shape, offsets, config.first_epoch, memory, windows)
        rows = {r: native.open_rows(r) for r in linked}
        return engine, native, {
            "segment": native.segment, "regions": native.regions, "address": engine.address, "rows": rows,
        }  # fmt: skip

    (engine, native, _), offers = all_or_none(
        group, "opening the transport", prepare, lambda made: made[2]
    )

    def connect() -> None:
        for r in near:
            native.map_peer(r, offers[r]["segment"], places.get(r, 0))
        peers = {r: engine.connect(offers[r]["address"]) for r in linked}
        for r, peer in peers.items():
            try:
                engine.wait_ready(peer, CONNECT_TIMEOUT_S)
            except MoeCommError as error:
                raise TransportError(
                    f"rank {group.rank} to rank {r} over {engine.transport}: {error}"
                ) from None
            window, release = offers[r]["rows"][group.rank]
            native.link_peer(r, peer, offers[r]["regions"], window, release)

    all_or_none(group, "connecting", connect, lambda made: None)
    native.start()
    return OpenExchange(engine, native, topology, windows, apart)


@contextlib.contextmanager
def _described(windows: Any, linked: bool) -> Iterator[tuple[int, int, int, int, int, bool]]:
    """Memory of windows as the engine takes it. `linked`: the network reaches it."""
    if windows is None:
        yield 0, 0, -1, 0, 0, False
        return
    with windows.exported() if linked else contextlib.nullcontext((-1, 0, 0)) as dmabuf:
        yield windows.address, windows.num_bytes, *dmabuf, linked


def _engine_of(group: EPGroup, config: Config, transport: str, interface: str) -> _engine.Engine:
    """One for all Buffers of a group. `interface`: what is asked for, or was found."""
    key = (transport, config.interface, config.shard_bytes, config.chaos_seed)
    with group.lock:
        if key not in group.engines:
            seed = config.chaos_seed and config.chaos_seed * 1000 + group.rank + 1
            group.engines[key] = _engine.Engine(
                transport=transport, interface=interface, secret=group.secret, shard_bytes=config.shard_bytes,
                chaos_seed=seed,
            )  # fmt: skip
        return group.engines[key]


def all_or_none(group: EPGroup, what: str, step: Callable, offer: Callable):
    """Runs a step on every rank; if it failed on one, all raise with its text."""
    made, error = None, None
    try:
        made = step()
    except MoeCommError as caught:
        error = caught
    try:
        answers = group.gather((str(error) if error else None, None if error else offer(made)))
    except PeerTimeout:
        if error:  # what went wrong here says more than who does not answer
            raise error from None
        raise
    if error:
        raise error
    for r, answer in enumerate(answers):
        if answer is not None and answer[0] is not None:
            raise TransportError(f"{what}: rank {r} failed: {answer[0]}")
    return made, [answer and answer[1] for answer in answers]
