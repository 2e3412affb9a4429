"""DeviceRing: a ring by which kernels command the engine's proxy, and stream waits that it ends.

    ring = engine.device_ring(device)                       # TransferEngine
    send[...](…, ring.struct, …)                            # kernels push Transfers (kernels/ring.cuh)
    ring.arm(wait, epoch); ring.stream_wait()               # on the current stream; nobody waits in a kernel
    unpack[...](…, waited=ring.status_address(), …)         # does nothing if the wait failed
    ring.raise_fault()                                      # at the next call or sync: PeerTimeout, PeerLost, …

The slots, the word `taken`, the abort word and the words of armed waits are one block of pages of the host, made by the
engine (csrc/mapped_ring.hpp) and mapped by the GPU (memory.Pinned); tickets lie on the device. A ring is one device's.
What a wait waits for is told to the engine: `_engine.Engine.open_wait`, by rows and channels.

The first fault ends the ring for good: what is armed, or will be, ends with a status that is not 0, and its kernels do
nothing. Without a GPU the same sources run as threads of the host: tests/kernels/test_device_exchange.py.
*Source*: ours.
"""

import torch
from torch import Tensor

from . import _engine
from .arguments import expect
from .kernels import fused
from .memory import Pinned

WAIT_STATUS = ("ok", "timeout", "aborted", "lost")  # csrc/abi.hpp: WaitStatus


def limit_ms(timeout_s: float | None) -> int:
    """Of an Arm; 0: the ring's own."""
    return 0 if timeout_s is None else max(1, min(2**31 - 1, round(1e3 * timeout_s)))


class DeviceRing:
    """Attached until `close`. May be used by any thread; commands are ordered by the streams that push them.

    Args:
        native: the engine in C++.
        device: whose kernels push.
        num_slots: commands on their way, a power of two.
        num_words: armed waits at a time.
        num_times: sources of waits that are timed.
        timeout_s: of a wait for room, and of armed waits that are given none.
        silent_s: a source whose heartbeat stopped is given up after that.

    Raises: ArgumentError; TransportError; RuntimeError where the device cannot map host memory.
    """

    def __init__(
        self,
        native: _engine.Engine,
        device: torch.device | str,
        *,
        num_slots: int = 4096,
        num_words: int = 64,
        num_times: int = 0,
        timeout_s: float = 300.0,
        silent_s: float = 30.0,
        first_ticket: int = 0,
    ):
        self.device = torch.device(device)
        self._native = native
        self._ring = native.attach_ring(
            num_slots, num_words, num_times, timeout_s, silent_s, first_ticket
        )
        self._open = True
        try:
            self._pinned = Pinned(self._ring.address, self._ring.num_bytes, self.device)
            ticket = first_ticket - (first_ticket >> 63 << 64)  # as int64
            self._tickets = torch.full((2,), ticket, dtype=torch.int64, device=self.device)
            self._pushed = torch.zeros(num_words, dtype=torch.int32, device=self.device)
        except BaseException:
            self._native.detach_ring(self._ring)
            raise

    @property
    def struct(self) -> fused.DeviceRing:
        """What kernels take: addresses as the device sees them."""
        slots, taken, abort_word, *_ = map(self._pinned.on_device, self._ring.addresses)
        reserved, taken_seen = (self._tickets[i:].data_ptr() for i in (0, 1))
        return fused.DeviceRing(
            slots=slots, reserved=reserved, taken_seen=taken_seen, taken=taken, abort_word=abort_word,
            num_slots=self._ring.num_slots, timeout_ns=self._ring.timeout_ns,
        )  # fmt: skip

    def word_address(self, word: int = 0) -> int:
        """Of an ArmedWord, on the device: `ended`, and 8 bytes behind it `status`."""
        expect(0 <= word < self._ring.num_words, "word", f"0 to {self._ring.num_words - 1}", word)
        return self._pinned.on_device(self._ring.addresses[3]) + 16 * word

    def times_address(self) -> int:
        """uint64 [num_times], on the device: nanoseconds from an arm to each of its sources."""
        return self._pinned.on_device(self._ring.addresses[4])

    def status_address(self, word: int = 0) -> int:
        """What kernels behind an armed wait take as `waited`."""
        return self.word_address(word) + 8

    def arm(
        self, wait: int, epoch: int | Tensor, word: int = 0, timeout_s: float | None = None
    ) -> None:
        """On the current stream: asks the proxy to end `word` when all sources of `wait` came for this epoch (an int64
        tensor: read there when the stream comes to it), after `timeout_s` (default: the ring's), or when the ring ends.
        Not again before it ended."""
        number, base = (0, epoch.data_ptr()) if isinstance(epoch, Tensor) else (epoch % 2**48, 0)
        fused.launch(
            "moe_comm_arm", self.struct, wait, word, number, base, limit_ms(timeout_s), self.word_address(word),
            self._pushed[word:], device=self.device, num_blocks=1,
        )  # fmt: skip

    def stream_wait(self, word: int = 0) -> None:
        """The current stream goes on when `word` ended: no SM waits. Kernels behind it look at its status first."""
        fused.stream_wait(self.word_address(word), 1, self.device)

    def status(self, word: int = 0) -> str | None:
        """How an armed wait ended, as the host sees it: one of WAIT_STATUS; None: not yet."""
        ended, status = self._ring.word(word)
        return WAIT_STATUS[status] if ended else None

    def raise_fault(self) -> None:
        """Raises what ended the ring, if anything: PeerTimeout or PeerLost naming rank, peer, phase and epoch, …"""
        self._ring.raise_fault()

    @property
    def blamed(self) -> int | None:
        """The rank for which the wait was that ended the ring."""
        return self._ring.blamed - 1 if self._ring.blamed else None

    def stats(self) -> dict[str, int]:
        """Counts: commands taken; torn, of which one word was seen before the other; armed, ended, failed waits."""
        return self._ring.stats()

    def close(self) -> None:
        """Ends the ring, after what was pushed; waits end as aborted. Twice is fine.

        Streams that use it must have ended before this object goes."""
        if self._open:
            self._open = False
            self._native.detach_ring(self._ring)

    def __enter__(self) -> "DeviceRing":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __del__(self) -> None:
        if getattr(self, "_open", False) and hasattr(self, "_pushed"):
            self.close()
