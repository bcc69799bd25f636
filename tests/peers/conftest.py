"""Makes the checkouts that are there importable."""

import sys

from support.checkouts import checkout

for _name in ("guided-diffusion", "improved-diffusion"):
    _found = checkout(_name)
    if _found is not None and str(_found) not in sys.path:
        sys.path.append(str(_found))
