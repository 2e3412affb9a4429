"""The main function of a test's rank process: in a module of its own, so that it can be found by name."""

import os
import traceback

import through
import torch
import torch.distributed as dist

import moe_comm


def rank_main(fn, rank, num_ranks, store_path, pipe, environment, args):
    torch.set_num_threads(1)
    for name in [n for n in os.environ if n.startswith("MOE_COMM_")]:
        del os.environ[name]  # those of the fork server's start
    os.environ.update(environment)
    try:
        if environment.get(through.VARIABLE):
            through.install(environment[through.VARIABLE])
        group = moe_comm.EPGroup.from_store(
            dist.FileStore(store_path, num_ranks), rank, num_ranks, timeout_s=60
        )
        pipe.send(("ok", fn(rank, group, *args)))
    except BaseException:
        pipe.send(("error", traceback.format_exc()))
    pipe.close()
