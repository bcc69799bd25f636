"""`python -m ddpm_ext` is `ddpm-ext`."""

import sys

from ddpm_ext.cli.main import main

sys.exit(main())
