"""Has a model complete prompts: `taid-jax generate`, from a clone."""

import sys

from taid_jax.cli import main

if __name__ == "__main__":
    sys.exit(main(["generate", *sys.argv[1:]]))
