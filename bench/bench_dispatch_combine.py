"""Dispatch and combine, timed: on local ranks, or under torchrun or srun. The same as `moe-efa bench`."""

import sys

from moe_efa.bench import main

if __name__ == "__main__":
    sys.exit(main())
