"""Plants defects one by one, and says which the tests do not see.

    python benchmarks/planted_defects.py [NAME ...] [--check]

planted_defects.toml has them: each is one change of one line that a careless hand
could make, and the tests named beside it have to fail. All is done in a copy of the
checkout, so that a kill leaves nothing behind.
"""

import argparse
import pathlib
import shutil
import subprocess
import sys
import tempfile
import time
import tomllib
from typing import NamedTuple

ROOT = pathlib.Path(__file__).resolve().parents[1]


class Defect(NamedTuple):
    """A change that tests have to notice.

    Attributes:
        name: What is broken.
        file: Where.
        text: What stands there, once.
        broken: What is put in its place.
        tests: Files or folders that have to fail.
    """

    name: str
    file: str
    text: str
    broken: str
    tests: list[str]


def read_defects() -> list[Defect]:
    """Returns the defects of planted_defects.toml."""
    listed = tomllib.loads(pathlib.Path(__file__).with_suffix(".toml").read_text())
    return [Defect(name, **values) for name, values in listed.items()]


def find_stale(defects: list[Defect]) -> list[str]:
    """Returns the defects whose text does not stand once in its file any more."""
    return [
        f"{defect.name}: {times} times in {defect.file}"
        for defect in defects
        if (times := (ROOT / defect.file).read_text().count(defect.text)) != 1
    ]


def survives(defect: Defect, root: pathlib.Path) -> bool:
    """Returns whether the tests pass with a defect planted.

    Raises:
        RuntimeError: If they did not run.
    """
    path = root / defect.file
    sound = path.read_text()
    path.write_text(sound.replace(defect.text, defect.broken))
    command = [sys.executable, "-m", "pytest", "-n", "0", "-q", "-x", *defect.tests]
    try:
        # The current folder comes first on the path: the copy, not what is installed.
        done = subprocess.run(command, cwd=root, capture_output=True, text=True)
    finally:
        path.write_text(sound)
    if done.returncode not in (0, 1):
        raise RuntimeError(f"{defect.name}: pytest ended with\n{done.stdout[-2000:]}")
    return done.returncode == 0


def main() -> int:
    """Plants all defects, or those that are named; 1 where one is not noticed."""
    parser = argparse.ArgumentParser(description="Plants defects one by one.")
    parser.add_argument("names", nargs="*", help="of the defects; all by default")
    parser.add_argument("--check", action="store_true", help="only look for stale ones")
    flags = parser.parse_args()
    defects = read_defects()
    if stale := find_stale(defects):
        print("\n".join(stale), file=sys.stderr)
        return 2
    if flags.check:
        return 0
    alive = []
    with tempfile.TemporaryDirectory() as folder:
        copy = pathlib.Path(folder, "checkout")
        skipped = shutil.ignore_patterns(".git", "runs", "site", "*.pyc")
        shutil.copytree(ROOT, copy, ignore=skipped)
        for defect in defects:
            if flags.names and defect.name not in flags.names:
                continue
            start = time.monotonic()
            lives = survives(defect, copy)
            alive += [defect.name] if lives else []
            verdict = "LIVES" if lives else "noticed"
            print(f"{defect.name:24} {verdict}, {time.monotonic() - start:.0f} s")
    print(f"{len(alive)} not noticed: {', '.join(alive) or 'none'}")
    return 1 if alive else 0


if __name__ == "__main__":
    sys.exit(main())
