"""A pretended device: tensors whose memory no host code can reach, and copies that are late.

A `Far` tensor holds a host tensor that only torch's own operations see: it is not on the CPU (it says "meta"), its
data_ptr is 0, and mixing it with CPU tensors in one operation is an error, as with CUDA. Copies wait in one queue, like
a stream's, until an event is asked twice or somebody looks at the device: until then a host tensor holds garbage, and
one that is written to while its copy to the device waits is found.
"""

import threading

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

from moe_comm import autograd, staging

GARBAGE = 0xA5
OPS = {f"moe_comm::{op._name}": op._init_fn for op in (
    autograd._dispatch_op, autograd._combine_op, autograd._dispatch_again_op, autograd._combine_columns_op
)}  # fmt: skip


class Far(torch.Tensor):
    @staticmethod
    def __new__(cls, near):
        return torch.Tensor._make_wrapper_subclass(
            cls, near.size(), strides=near.stride(), storage_offset=near.storage_offset(), dtype=near.dtype,
            device="meta",
        )  # fmt: skip

    def __init__(self, near):
        self._near = near

    @property
    def near(self):
        """Its contents, after everything that was queued."""
        QUEUE.run()
        return self._near

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return call(func, args, kwargs or {})

    def __repr__(self):
        return f"Far({self._near.dtype}, {tuple(self.shape)})"


class FarFactories(TorchDispatchMode):
    """Inside, tensors made on Far's device are Far."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if str(kwargs.get("device")) == "meta":
            return call(func, args, kwargs)
        return func(*args, **kwargs)


def call(func, args, kwargs):
    if func.name() in OPS:
        return OPS[func.name()](*args, **kwargs)
    tensors = [t for t in tree_flatten((args, kwargs))[0] if isinstance(t, torch.Tensor)]
    mixed = [t for t in tensors if not isinstance(t, Far) and t.dim()]
    copies = func.overloadpacket in (torch.ops.aten.copy_, torch.ops.aten._to_copy)
    if mixed and len(mixed) < len(tensors) and not copies:
        raise RuntimeError(f"{func}: tensors on two devices")
    to_cpu = str(kwargs.get("device")) == "cpu"
    kwargs = {k: torch.device("cpu") if k == "device" and v is not None else v for k, v in kwargs.items()}  # fmt: skip
    args, kwargs = tree_map(lambda t: t.near if isinstance(t, Far) else t, (args, kwargs))
    out = func(*args, **kwargs)
    return out if to_cpu else tree_map(lambda t: Far(t) if isinstance(t, torch.Tensor) else t, out)


class Queue:
    """Copies in their order, each done when something behind it is waited for."""

    def __init__(self):
        self._lock = threading.RLock()
        self._todo, self._added, self._done = [], 0, 0

    def add(self, source, target):
        with self._lock:
            self._todo.append((source, target, source.clone()))
            self._added += 1
            return self._added

    def run(self, up_to=None):
        with self._lock:
            while self._todo and (up_to is None or self._done < up_to):
                source, target, as_added = self._todo.pop(0)
                same = (raw(source) == raw(as_added)).all()
                target.copy_(source)
                self._done += 1
                assert same, "written to while its copy waited"


def raw(tensor):
    return torch.empty(tensor.numel(), dtype=tensor.dtype).copy_(tensor.flatten()).view(torch.uint8)


QUEUE = Queue()


class FarEvent:
    def __init__(self):
        self._at, self._asked = QUEUE._added, False

    def query(self):
        if not self._asked:
            self._asked = True
            return False
        QUEUE.run(self._at)
        return True

    def wait(self):
        pass  # there is one stream


class FarCopies:
    """`staging.Copies` of Far tensors."""

    problem = ""
    stuck = False  # the stream never comes to its end

    def new_host(self, shape, dtype):
        return spoil(torch.empty(shape, dtype=dtype))

    def to_host(self, tensor):
        host = spoil(torch.empty_like(tensor._near))
        QUEUE.add(tensor._near, host)
        return host

    def new_device(self, host, device):
        return Far(spoil(torch.empty_like(host)))

    def to_device(self, host, target):
        assert type(host) is torch.Tensor and type(target) is Far
        QUEUE.add(host, target._near)

    def event(self, device):
        made = FarEvent()
        if self.stuck:
            made.query = lambda: False
        return made

    def refuses(self, device):
        return self.problem


def spoil(tensor):
    if tensor.numel():
        tensor.untyped_storage().fill_(GARBAGE)
    return tensor


def install():
    """Far tensors are staged from now on in this process."""
    staging.DEVICES["meta"] = FarCopies()
    return staging.DEVICES["meta"]
