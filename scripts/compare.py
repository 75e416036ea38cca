"""Trains several methods: `taid-jax compare`, from a clone."""

import sys

from taid_jax.cli import main

if __name__ == "__main__":
    sys.exit(main(["compare", *sys.argv[1:]]))
