"""python -m moe_comm.bench: what `moe-comm bench` runs, and what it starts in every rank."""

import sys

from . import main

sys.exit(main())
