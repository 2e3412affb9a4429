"""The ranks of the demo: what one does, and how the parent starts, reaches and ends them.

A rank and the parent talk by a pipe: messages from a rank are (kind, value) or ("error", traceback). At the first error
the other ranks get three seconds to say what they saw, the silent ones are asked where they are, and all are killed.
"""

from __future__ import annotations

import contextlib
import faulthandler
import multiprocessing
import os
import signal
import time
import traceback
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from .job import SEQS_PER_RANK, Job, build_model, build_optimizer, loss_and_logits, quieten

# Imported once by a fork server: four ranks then start for the price of one (on two cores in 3 s instead of 20).
_PRELOAD = [
    "transformers.models.qwen3_moe.modeling_qwen3_moe",
    "moe_comm.integrations.transformers",
]
_GRACE_S = 3.0


class DemoError(Exception):
    """A rank failed; the text holds every traceback."""


def _rank_main(rank: int, job: Job, pipe: Connection, stacks: str) -> None:
    """A rank from start to end. Every failure travels to the parent as text."""
    with open(stacks, "w") as file:
        faulthandler.register(signal.SIGUSR1, file=file)  # the parent asks before it kills
        try:
            signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's; it ends us
            _serve(rank, job, pipe)
        except BaseException:
            pipe.send(("error", traceback.format_exc()))
            raise SystemExit(1) from None


def _serve(rank: int, job: Job, pipe: Connection) -> None:
    quieten()
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"  # torch.distributed stays on this host
    from torch.distributed.device_mesh import init_device_mesh

    import moe_comm.integrations.transformers as expert_parallel

    store = dist.FileStore(job.store, job.ranks)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=job.ranks)
    mesh = init_device_mesh("cpu", (job.ranks, 1), mesh_dim_names=("ep", "tp"))
    model = build_model(job.layers)
    expert_parallel.parallelize(
        model, mesh["ep"], mesh["tp"], layout=job.layout, ranks_per_node=job.ranks_per_node
    )
    optimizer = build_optimizer(model)
    pipe.send(("ready", None))

    mine = slice(rank * SEQS_PER_RANK, (rank + 1) * SEQS_PER_RANK)
    for _ in range(job.steps):
        tokens = torch.from_numpy(pipe.recv())
        optimizer.zero_grad()
        loss, logits = loss_and_logits(model, tokens[mine], tokens[:, 1:].numel())
        loss.backward()
        expert_parallel.all_reduce_gradients(model, mesh["ep"])
        gradients = expert_parallel.full_gradients(model)
        optimizer.step()
        # One rank's gradients are enough, they are reduced; every rank's loss and logits are its own.
        arrays = {name: grad.numpy() for name, grad in gradients.items()} if rank == 0 else None
        pipe.send(("step", (loss.item(), logits.detach().numpy(), arrays)))

    stats = [buffer.stats() for buffer in expert_parallel.buffers()]
    pipe.send(("stats", {key: sum(s[key] for s in stats) for key in stats[0]}))
    expert_parallel.close()
    dist.barrier()  # nobody leaves while another still needs the store
    dist.destroy_process_group()


class Ranks:
    """The processes of a job. `receive` and `send` reach all of them; leaving the `with` block ends them."""

    def __init__(self, job: Job, folder: Path, deadline_s: float):
        self._deadline_s, self._deadline = deadline_s, time.monotonic() + deadline_s
        self._stacks = [folder / f"rank{rank}.stacks" for rank in range(job.ranks)]
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(_PRELOAD)
        self._pipes: list[Connection] = []
        self._processes = []
        for rank in range(job.ranks):
            ours, theirs = context.Pipe()
            process = context.Process(
                target=_rank_main, args=(rank, job, theirs, str(self._stacks[rank])), daemon=True
            )
            process.start()
            theirs.close()  # so that the end of the process is the end of the pipe
            self._pipes.append(ours)
            self._processes.append(process)

    def __enter__(self) -> Ranks:
        return self

    def __exit__(self, error: object, *_: object) -> None:
        for process in self._processes:
            process.join(timeout=0 if error else 10)
            process.kill()
            process.join()

    def send(self, message: Any) -> None:
        for pipe in self._pipes:
            with contextlib.suppress(BrokenPipeError):  # `receive` will say why
                pipe.send(message)

    def receive(self, kind: str) -> list[Any]:
        """One message of `kind` from every rank, by rank. *Raises* DemoError with all tracebacks."""
        found: dict[int, Any] = {}
        while len(found) < len(self._pipes):
            waiting = [pipe for rank, pipe in enumerate(self._pipes) if rank not in found]
            ready = wait(waiting, timeout=max(0.0, self._deadline - time.monotonic()))
            if not ready:
                self._fail({}, f"the ranks were not done after {self._deadline_s:.0f} s")
            for rank in [r for r, pipe in enumerate(self._pipes) if pipe in ready]:
                text, value = self._read(rank)
                if text is not None:
                    self._fail({rank: text}, "a rank failed")
                got, found[rank] = value
                if got != kind:
                    self._fail({}, f"rank {rank}: expected {kind!r}, got {got!r}")
        return [found[rank] for rank in range(len(self._pipes))]

    def _read(self, rank: int) -> tuple[str | None, Any]:
        """The error of a rank, or its next message."""
        try:
            message = self._pipes[rank].recv()
        except (EOFError, ConnectionResetError):
            self._processes[rank].join(timeout=5)
            return f"ended without a traceback, exit code {self._processes[rank].exitcode}", None
        return (message[1], None) if message[0] == "error" else (None, message)

    def _fail(self, errors: dict[int, str], what: str) -> None:
        """Give the other ranks three seconds to say what they saw, ask the silent ones where they are, kill all."""
        until = time.monotonic() + _GRACE_S
        silent = [rank for rank in range(len(self._pipes)) if rank not in errors]
        while silent and (
            ready := wait(
                [self._pipes[r] for r in silent], timeout=max(0.0, until - time.monotonic())
            )
        ):
            for rank in [r for r in silent if self._pipes[r] in ready]:
                text, _ = self._read(rank)
                if text is not None:
                    errors[rank] = text
                    silent.remove(rank)
        for rank in silent:
            if (pid := self._processes[rank].pid) is not None:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGUSR1)
        time.sleep(0.3)
        for rank in silent:
            errors[rank] = "was here when it was ended:\n" + self._stacks[rank].read_text()
        text = "\n".join(f"--- rank {rank}: {errors[rank].rstrip()}" for rank in sorted(errors))
        raise DemoError(f"{what}\n{text}")
