"""Which address of this host the ranks of other hosts can reach: tried, not asked.

A host has interfaces that lead nowhere (a bridge of containers, a management network), often with the same address on
every host. So each rank listens on all of its addresses, one rank of every other host connects to all of them, and an
address counts where the listener's own token comes back. The second gather is only for several hosts.
"""

import contextlib
import errno
import fcntl
import os
import secrets
import select
import selectors
import socket
import struct
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from .group import EPGroup

PROBE_S = 1.0  # until an address that does not answer counts as out of reach
TOKEN_BYTES = 16
_SIOCGIFFLAGS, _SIOCGIFADDR = 0x8913, 0x8915
_UP, _LOOPBACK = 0x1, 0x8


def addresses() -> list[str]:
    """The IPv4 addresses of interfaces that are up, without the loopback; the fastest link first."""
    found = []
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as asked:
        for index, name in socket.if_nameindex():
            request = struct.pack("256s", name.encode())
            with contextlib.suppress(OSError):  # no address, or gone meanwhile
                reply = fcntl.ioctl(asked, _SIOCGIFFLAGS, request)
                flags = struct.unpack_from("H", reply, 16)[0]
                if flags & _UP and not flags & _LOOPBACK:
                    reply = fcntl.ioctl(asked, _SIOCGIFADDR, request)
                    found.append((-_speed(name), index, socket.inet_ntoa(reply[20:24])))
    return [address for _, _, address in sorted(found)]


def _speed(name: str) -> int:
    try:
        return int(Path(f"/sys/class/net/{name}/speed").read_text())
    except (OSError, ValueError):
        return 0


def reachable_address(group: EPGroup) -> str:
    """The first of this host's addresses that every other host reached; "" if there is one host, or no such address.

    Collective of the ranks that are present. Takes at most PROBE_S longer than the slowest rank.
    """
    token = secrets.token_bytes(TOKEN_BYTES)
    own = addresses()
    with _listening(own, token) as ports:
        offers = group.gather((_host(), token, list(zip(own, ports, strict=True))))
        first: dict[
            tuple[str, int], int
        ] = {}  # of each host: the rank that is tried, and that tries
        for r, offer in enumerate(offers):
            if offer is not None:
                first.setdefault(offer[0], r)
        if len(first) == 1:
            return ""
        reached: set[tuple[int, str]] = set()
        if group.rank in first.values():
            others = [r for r in first.values() if r != group.rank]
            reached = _try([(r, offers[r][1], *place) for r in others for place in offers[r][2]])
        answers = group.gather(reached)
    here = first[_host()]
    needed = [r for r in first.values() if r != here]
    for address, _ in offers[here][2]:
        if all((here, address) in answers[r] for r in needed):
            return address
    return ""


def _host() -> tuple[str, int]:
    """The same for processes that share interfaces."""
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return boot, os.stat("/proc/self/ns/net").st_ino


@contextlib.contextmanager
def _listening(own: list[str], token: bytes) -> Iterator[list[int]]:
    """Ports, one for each address, on which whoever connects is sent the token."""
    with contextlib.ExitStack() as stack:
        listeners = [stack.enter_context(socket.socket()) for _ in own]
        for listener, address in zip(listeners, own, strict=True):
            listener.bind((address, 0))
            listener.listen(1024)
        ended = threading.Event()

        def answer() -> None:
            while not ended.is_set():
                for listener in select.select(listeners, [], [], 0.02)[0]:
                    with contextlib.suppress(OSError), listener.accept()[0] as caller:
                        caller.sendall(token)

        thread = threading.Thread(target=answer, name="moe_comm:source", daemon=True)
        thread.start()
        try:
            yield [listener.getsockname()[1] for listener in listeners]
        finally:
            ended.set()
            thread.join()


def _try(places: list[tuple[int, bytes, str, int]]) -> set[tuple[int, str]]:
    """Of (rank, its token, address, port): the (rank, address) that answered with this token."""
    reached = set()
    with contextlib.ExitStack() as stack:
        waiting = stack.enter_context(selectors.DefaultSelector())
        for place in places:
            caller = stack.enter_context(socket.socket())
            caller.setblocking(False)
            if caller.connect_ex((place[2], place[3])) in (0, errno.EINPROGRESS):
                waiting.register(caller, selectors.EVENT_READ, place)
        deadline = time.monotonic() + PROBE_S
        while waiting.get_map() and (left := deadline - time.monotonic()) > 0:
            for key, _ in waiting.select(left):
                rank, token, address, _ = key.data
                waiting.unregister(key.fileobj)
                with contextlib.suppress(OSError):
                    if os.read(key.fd, TOKEN_BYTES) == token:
                        reached.add((rank, address))
    return reached
