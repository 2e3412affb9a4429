"""What do dispatch and combine take, next to other ways to move the same tokens? The same as `moe-comm bench`.

Methods, protocol and traps: moe_comm/bench/ (it is part of the package, so that an installed one can be measured).

    python bench/bench_dispatch_combine.py [--quick] [--json results.jsonl] [--plot results.png] [--help]
    torchrun --nproc-per-node 4 bench/bench_dispatch_combine.py …       likewise srun, mpirun
"""

import sys

from moe_comm.bench import main

sys.exit(main())
