"""Generations: how a Buffer's ranks go on without some of them, and take them back.

A fault ends a generation: every call raises it. `recover` begins the next one: whoever is still there meets over the
group's Store, all agree on who that is, and windows, segments, immediate rows and connections are made anew, so that
late bytes of a stopped process land in memory that nobody reads any more.

    here/r   each rank says that it came (and, if it is a newcomer, that it wants in)
    decided  the members, written once by compare-and-set: by the first that sees all it expects, or whose time is up

Only ranks that are not taken for lost are waited for, and those that the caller names. A link that was cut makes ranks
take each other for lost though they live, not all of them the same ones: when it is mended, name them to `recover`
(`expect`), or whoever expects fewest decides without the rest.

A rank that finds itself left out raises PeerLost; by `rejoin` it waits for the survivors' next meeting. Newcomers never
decide, or a lone one would found a group of its own. Meetings are numbered; one that was decided is over, so a meeting
whose members then failed is followed by the next.
"""

import json
import time
from collections.abc import Collection

from .errors import PeerLost, PeerTimeout
from .group import EPGroup

_POLL_S = 0.01


def meet(
    group: EPGroup,
    name: str,
    after: int,
    *,
    expected: Collection[int],
    masked: Collection[int] = (),
    joining: bool = False,
    timeout_s: float,
) -> tuple[int, list[int]]:
    """The number of the next generation after `after` that this rank is of, and its members, ascending.

    `expected`: ends the wait when they all came. `masked`: left out whether they come or not. Raises: PeerLost for a
    rank that the others left out; PeerTimeout for a newcomer whom nobody met.
    """
    store, rank = group.store, group.rank
    deadline = time.monotonic() + timeout_s
    number = after + 1
    came = -1  # the last meeting we came to

    def key(*parts: object) -> str:
        return "/".join(("moe_comm", group.name, name, "generation", str(number), *map(str, parts)))

    while True:
        if store.check([key("decided")]):
            members = json.loads(store.get(key("decided")))
            if rank in members and came == number:
                return number, members
            if rank not in members and not joining:
                raise PeerLost(
                    f"recover: rank {rank} was left out of generation {number} (ranks {members}): it may rejoin"
                )
            number += 1
            continue
        if came != number:
            came = number
            store.set(key("here", rank), "1")
        here = [r for r in range(group.num_ranks) if store.check([key("here", r)])]
        late = time.monotonic() >= deadline
        if joining and late:
            store.delete_key(key("here", rank))
            raise PeerTimeout(
                f"rejoin: rank {rank} waited {timeout_s:.1f} s for generation {number}: nobody called recover"
            )
        if not joining and (late or set(expected) <= set(here)):
            members = [r for r in here if r not in masked]
            store.compare_set(key("decided"), "", json.dumps(members))
            continue
        time.sleep(_POLL_S)
