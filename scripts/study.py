"""Says what the methods are worth: `taid-jax study`, from a clone."""

import sys

from taid_jax.cli import main

if __name__ == "__main__":
    sys.exit(main(["study", *sys.argv[1:]]))
