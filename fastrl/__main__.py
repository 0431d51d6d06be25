"""`python -m fastrl`, and `torchrun --nproc_per_node N -m fastrl` for N processes that train together."""

from __future__ import annotations

import sys

from fastrl.cli import main

if __name__ == "__main__":
    sys.exit(main())
