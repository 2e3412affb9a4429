"""A real dispatch and combine of 4 ranks as 2 nodes, compared with moe_comm.reference bit for bit. Runs anywhere:

    python tests/soft_roce/exchange.py verbs            # or another transport, for comparison: fabric:tcp;ofi_rxm

One process imports torch (a minute in an emulated machine) and forks the ranks. Ends with status 0 if all ranks agree.
"""

import os
import sys
import tempfile
import time
import traceback
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "ep"))

import torch
import torch.distributed as dist
from cases import check_dispatched, dispatch, expected, make_case, node_list, same

import moe_comm
from moe_comm import reference

NUM_RANKS, RANKS_PER_NODE = 4, 2
NUM_CALLS = 4  # both banks, twice


def exchange(rank: int, group, transport: str, hops: str, case, want, ys, back) -> dict[str, int]:
    """Dispatches and combines NUM_CALLS times; returns what crossed the network. Raises where bits differ."""
    with moe_comm.Buffer(
        group, hidden=case.xs[0].shape[1], topk=3, num_experts=case.num_experts, transport=transport,
        ranks_per_node=RANKS_PER_NODE, hops=hops, window_bytes=2**20, timeout_s=120.0,
    ) as buffer:  # fmt: skip
        for _ in range(NUM_CALLS):
            got = dispatch(buffer, case, rank)
            check_dispatched(got, want, rank)
            y = buffer.combine(ys[rank], got.handle, weights=got.topk_weights)
            assert same(y, back[hops].x[rank])
        return buffer.stats()


def rank_main(rank: int, store_path: str, transport: str, *inputs) -> int:
    try:
        torch.set_num_threads(1)
        store = dist.FileStore(store_path, NUM_RANKS)
        group = moe_comm.EPGroup.from_store(store, rank, NUM_RANKS, timeout_s=120)
        for hops in ("node", "rank"):
            stats = exchange(rank, group, transport, hops, *inputs)
            print(f"rank {rank}, hops={hops}: {NUM_CALLS} calls ok, {stats}", flush=True)
        return 0
    except BaseException:
        print(f"rank {rank}:\n{traceback.format_exc()}", flush=True)
        return 1


def main() -> int:
    transport = sys.argv[1]
    start = time.monotonic()
    case = make_case(NUM_RANKS, tokens=[40, 0, 7, 25], hidden=512, layout="expert")
    want = expected(case)
    ys = [(x.float() * 1.5 + 0.25).to(x.dtype) for x in want.x]
    nodes = node_list(NUM_RANKS, RANKS_PER_NODE)
    back = {
        hops: reference.combine(
            ys, want.bookkeeping, weights=want.topk_weights, node_of=nodes, hops=hops
        )
        for hops in ("node", "rank")
    }
    with tempfile.TemporaryDirectory() as folder:
        children = []
        for rank in range(NUM_RANKS):
            if (pid := os.fork()) == 0:
                os._exit(rank_main(rank, f"{folder}/store", transport, case, want, ys, back))
            children.append(pid)
        failed = [
            rank
            for rank, pid in enumerate(children)
            if os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        ]
    print(
        f"{transport}: {time.monotonic() - start:.1f} s after the imports; failed ranks: {failed}"
    )
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
