"""Which NICs a rank's engine takes where it is told none: the nearest (csrc/topology.hpp), on every rank as many.

NIC i of a rank talks to NIC i of its peers, so their number must be the same. Hosts may differ in their NICs and in how
many ranks divide them: all take as many as the rank that finds fewest.
"""

from . import _engine
from .errors import MoeCommError, TransportError
from .group import EPGroup

CHOOSING = {
    "verbs": False,
    "fabric:efa": True,
}  # transports that may be given no device: whether NICs of EFA


def agreed_interface(
    group: EPGroup,
    transport: str,
    interface: str,
    place: tuple[int, int],
    engine: "_engine.Engine | None",
) -> str:
    """`interface` with devices, where it has none. Collective.

    place: (i, n), of this rank among those that divide the same NICs. engine: one that is open already, and stays.
    Raises: TransportError on every rank where one that names its NICs, or has them open, has more or fewer than others.
    """
    if transport not in CHOOSING:
        return interface
    parts = [part for part in interface.split(",") if part]
    settings = [part for part in parts if "=" in part]
    devices = [part for part in parts if "=" not in part]
    names, is_fixed = [], True
    if engine is not None:
        names = engine.transport.split("+")
    elif devices:
        names = devices[0].split("+")
    else:
        is_fixed = False
        try:
            chosen = _engine.choose_nics(
                efa=CHOOSING[transport], place=place[0], num_places=place[1]
            )
            names = list(chosen[0])
        except MoeCommError:  # the library is asked: it takes one, or says what is missing
            pass
    found = group.gather((names, is_fixed))
    counts = {r: max(len(theirs[0]), 1) for r, theirs in enumerate(found) if theirs is not None}
    fewest = min(counts, key=lambda r: counts[r])
    for r, count in counts.items():
        if found[r][1] and count != counts[fewest]:
            mine, theirs = ("+".join(found[i][0]) or "the first" for i in (r, fewest))
            raise TransportError(
                f"interface: expected as many NICs on every rank, got {count} on rank {r} ({mine}) "
                f"and {counts[fewest]} on rank {fewest} ({theirs})"
            )
    if is_fixed or not names:
        return interface
    return ",".join(["+".join(names[: counts[fewest]]), *settings])
