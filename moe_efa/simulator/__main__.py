"""`python -m moe_efa.simulator`."""

import sys

from moe_efa.simulator import main

sys.exit(main())
