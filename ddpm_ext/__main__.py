"""`python -m ddpm_ext` is `ddpm-ext`."""

import sys

from ddpm_ext.cli import main

sys.exit(main())
