"""Scores a student: `taid-jax evaluate`, from a clone."""

import sys

from taid_jax.cli import main

if __name__ == "__main__":
    sys.exit(main(["evaluate", *sys.argv[1:]]))
