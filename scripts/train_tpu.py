"""Distils a teacher into a student: `taid-jax train`, from a clone."""

import sys

from taid_jax.cli import main

if __name__ == "__main__":
    sys.exit(main(["train", *sys.argv[1:]]))
