"""The suites of CPU tensors again, through another device: `pytest tests/ep --through far` (or cuda, or kernels).

Public calls are wrapped: tensors they are given are moved to the device, the real call runs on those, and what it
returns is moved back and compared as ever. far: tests/far.py, a pretended one. cuda: the first GPU.
kernels: Buffers that can be are made of kernels, run by threads of the host (tests/kernels/host_device.py). apart: so,
and windows lie in memory of their own, as if it were a device's (tests/kernels/apart.py). rounds: so, and calls take a
round for every three tokens.
"""

import functools
import importlib
import os
import sys
import tempfile
from pathlib import Path

import far
import torch

import moe_comm
from moe_comm import Dispatched
from moe_comm.event import Hook

KINDS = ("far", "cuda", "kernels", "apart", "rounds")
OF_KERNELS = ("kernels", "apart", "rounds")
VARIABLE, LIBRARY = "MOE_COMM_TEST_THROUGH", "MOE_COMM_TEST_KERNELS"
_real: dict = {}


def to_device(value, kind):
    if isinstance(value, (tuple, list)):
        return type(value)(to_device(v, kind) for v in value)
    if not isinstance(value, torch.Tensor) or not value.is_cpu:
        return value
    value = value.detach()
    return far.Far(value) if kind == "far" else value.cuda()


def to_host(value):
    if isinstance(value, far.Far):
        return value.near
    if isinstance(value, torch.Tensor):
        return value.cpu()
    if isinstance(value, (tuple, list)):
        return type(value)(to_host(v) for v in value)
    if isinstance(value, Dispatched):
        value.__dict__.update({f: to_host(getattr(value, f)) for f in (
            "x", "topk_idx", "topk_weights", "tokens_per_expert"
        )})  # fmt: skip
        return value
    return value


def wrap(method, kind):
    @functools.wraps(method)
    def call(self, first, *args, **kwargs):
        out = kwargs.get("out") if method.__name__ == "combine" else None
        args = [
            to_device(first, kind),
            *(a if isinstance(a, tuple) else to_device(a, kind) for a in args),
        ]
        kwargs = {k: v if k == "handle" else to_device(v, kind) for k, v in kwargs.items()}
        result = method(self, *args, **kwargs)

        def back(result):
            result = to_host(result)
            if isinstance(out, torch.Tensor):
                combined = result[0] if isinstance(result, tuple) else result
                combined = combined[0] if isinstance(combined, tuple) else combined
                if combined.shape == out.shape:
                    out.copy_(combined)
                    result = (out, *result[1:]) if isinstance(result, tuple) else out
            return result

        if not isinstance(result, Hook):
            return back(result)
        inner = result

        def receive():
            inner()
            outer.result = back(inner.result)

        outer = Hook(receive)
        return outer

    return call


def install(kind):
    """Wraps moe_comm.Buffer's calls in this process."""
    if kind in OF_KERNELS:
        install_kernels(apart=kind == "apart")
        return in_rounds() if kind == "rounds" else None
    if kind == "far":
        far.install()
    for name in ("dispatch", "combine"):
        method = _real.setdefault(name, getattr(moe_comm.Buffer, name))
        setattr(moe_comm.Buffer, name, wrap(method, kind))


MOST_TOKENS = 512


def install_kernels(apart=False):
    sys.path.append(str(Path(__file__).parent / "kernels"))
    import host_device

    if apart:
        importlib.import_module("apart").install()
    library = os.environ.get(LIBRARY)
    if library is None:
        library = os.environ[LIBRARY] = host_device.build(
            Path(tempfile.mkdtemp(prefix="moe_comm_kernels_"))
        )
    host_device.run_on_host(library)
    make = _real.setdefault("__init__", moe_comm.Buffer.__init__)

    @functools.wraps(make)
    def init(self, group=None, *, hops="node", ranks_per_node=None, max_tokens=None, **options):
        asked = "device" in options or os.environ.get("MOE_COMM_DEVICE")  # made as its maker says
        if not asked:
            options["device"] = "cpu"
            if not (options.get("window_bytes") or options.get("mask_lost")):  # one round for all
                max_tokens = max_tokens or MOST_TOKENS
                options |= {"each_copy": True, "hidden": 2 * options.get("hidden", 7168)}
        make(
            self, group, hops=hops, ranks_per_node=ranks_per_node, max_tokens=max_tokens, **options
        )

    moe_comm.Buffer.__init__ = init


TOKENS_OF_A_ROUND = 3


def in_rounds():
    from moe_comm.kernel_exchange import KernelExchange

    make = KernelExchange.__init__

    @functools.wraps(make)
    def init(self, *args):
        make(self, *args)
        if self.masks is None:  # which needs one round
            self.chunk, self.in_rounds = TOKENS_OF_A_ROUND, True

    KernelExchange.__init__ = init


def uninstall():
    for name, method in _real.items():
        setattr(moe_comm.Buffer, name, method)
