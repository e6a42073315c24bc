"""Dispatch and combine over links of 1, 5 and 10 Gbit/s between network namespaces, beside plain sockets and others.

Needs root. `bench/README.md` says what is counted; `--quick` shows in half a minute that everything works.
"""

import sys

from moe_efa.bench.shaped import main

if __name__ == "__main__":
    sys.exit(main())
