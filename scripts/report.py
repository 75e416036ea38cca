"""Makes the page of a run anew: `taid-jax report`, from a clone."""

import sys

from taid_jax.cli import main

if __name__ == "__main__":
    sys.exit(main(["report", *sys.argv[1:]]))
