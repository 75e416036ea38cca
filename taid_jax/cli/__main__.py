"""`python -m taid_jax.cli`, the same as `taid-jax`."""

import sys

from taid_jax.cli import main

sys.exit(main())
