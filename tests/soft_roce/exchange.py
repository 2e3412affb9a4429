"""A real dispatch and combine, compared with moe_comm.reference bit for bit. Runs anywhere:

    python tests/soft_roce/exchange.py verbs       # 4 ranks of this host as 2 nodes; or fabric:efa, fabric:tcp;ofi_rxm
    torchrun --nnodes 2 --nproc-per-node 8 ... tests/soft_roce/exchange.py verbs   # a rank for each process

By itself, one process imports torch (a minute in an emulated machine) and forks the ranks. Ends with status 0 if all
ranks agree.
"""

import os
import sys
import tempfile
import traceback
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "ep"))

import torch
import torch.distributed as dist
from cases import check_dispatched, dispatch, expected, make_case, node_list, same

import moe_comm
from moe_comm import reference

NUM_CALLS = 4  # both banks, twice


def exchange(rank, group, transport, ranks_per_node, hops, case, want, ys, back) -> dict[str, int]:
    """Dispatches and combines NUM_CALLS times; returns what crossed the network. Raises where bits differ."""
    with moe_comm.Buffer(
        group, hidden=case.xs[0].shape[1], topk=3, num_experts=case.num_experts, transport=transport,
        ranks_per_node=ranks_per_node, hops=hops, window_bytes=2**20, timeout_s=120.0,
    ) as buffer:  # fmt: skip
        for _ in range(NUM_CALLS):
            got = dispatch(buffer, case, rank)
            check_dispatched(got, want, rank)
            y = buffer.combine(ys[rank], got.handle, weights=got.topk_weights)
            assert same(y, back.x[rank])
        return buffer.stats()


def make_inputs(num_ranks: int, ranks_per_node: int) -> dict:
    """{hops: (case, what dispatch must return, what experts return, what combine must return)}."""
    case = make_case(num_ranks, tokens=[(40, 0, 7, 25)[r % 4] for r in range(num_ranks)],
                     hidden=512, num_experts=2 * num_ranks - 1, layout="expert")  # fmt: skip
    want = expected(case)
    ys = [(x.float() * 1.5 + 0.25).to(x.dtype) for x in want.x]
    nodes = node_list(num_ranks, ranks_per_node)
    inputs = {}
    for hops in ("node", "rank"):
        back = reference.combine(
            ys, want.bookkeeping, weights=want.topk_weights, node_of=nodes, hops=hops
        )
        inputs[hops] = (case, want, ys, back)
    return inputs


def run_rank(rank: int, make_group, transport: str, ranks_per_node: int, inputs: dict) -> int:
    """The exit status of one rank."""
    try:
        torch.set_num_threads(1)
        group = make_group()
        for hops in inputs:
            stats = exchange(rank, group, transport, ranks_per_node, hops, *inputs[hops])
            print(f"rank {rank}, hops={hops}: {NUM_CALLS} calls ok, {stats}", flush=True)
        return 0
    except BaseException:
        print(f"rank {rank}:\n{traceback.format_exc()}", flush=True)
        return 1


def run_here(transport: str, num_ranks: int, ranks_per_node: int) -> int:
    """Forks the ranks."""
    inputs = make_inputs(num_ranks, ranks_per_node)
    children = []
    with tempfile.TemporaryDirectory() as folder:
        for rank in range(num_ranks):
            if (pid := os.fork()) == 0:

                def make_group(rank: int = rank):
                    store = dist.FileStore(f"{folder}/store", num_ranks)
                    return moe_comm.EPGroup.from_store(store, rank, num_ranks, timeout_s=120)

                os._exit(run_rank(rank, make_group, transport, ranks_per_node, inputs))
            children.append(pid)
        ends = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in children]
    failed = [rank for rank, status in enumerate(ends) if status]
    print(f"{transport}: failed ranks: {failed}")
    return 1 if failed else 0


def run_under_torchrun(transport: str) -> int:
    dist.init_process_group("gloo")
    ranks_per_node = int(os.environ["LOCAL_WORLD_SIZE"])
    inputs = make_inputs(dist.get_world_size(), ranks_per_node)
    return run_rank(dist.get_rank(), lambda: None, transport, ranks_per_node, inputs)


def main() -> int:
    transport = sys.argv[1]
    if "TORCHELASTIC_RUN_ID" in os.environ:
        return run_under_torchrun(transport)
    return run_here(transport, num_ranks=4, ranks_per_node=2)


if __name__ == "__main__":
    sys.exit(main())
