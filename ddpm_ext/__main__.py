"""`python -m ddpm_ext` runs the command `ddpm-ext`."""

import sys

from ddpm_ext.cli.main import main

sys.exit(main())
