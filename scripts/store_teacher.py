"""Stores a teacher's outputs: `taid-jax store`, from a clone."""

import sys

from taid_jax.cli import main

if __name__ == "__main__":
    sys.exit(main(["store", *sys.argv[1:]]))
