"""Puts the results of several runs of `evaluation.evaluate` into one table, by the folders they lie in.

python -m evaluation.compare out/ablations/*/results.json
"""

import argparse
import json
from pathlib import Path

from .evaluate import markdown


def main(argv: list[str] | None = None):
    """The command line."""
    parser = argparse.ArgumentParser(description="One table of several results.json.")
    parser.add_argument("results", type=Path, nargs="+", metavar="RESULTS.JSON")
    options = parser.parse_args(argv)
    groups = {}
    for path in options.results:
        for group, table in json.loads(path.read_text()).items():
            step = {f"one step {name.removeprefix('psnr_t999_')}": value for name, value in table["one step"].items()}
            groups.setdefault(group, {})[path.parent.name] = {**table["this checkpoint"], **step}
    for group, table in groups.items():
        print(markdown(group, table))


if __name__ == "__main__":
    main()
