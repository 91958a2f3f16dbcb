"""Puts the results of several runs of `evaluation.evaluate` into one table, by the folders they lie in.

python -m evaluation.compare out/ablations/*/results.json
"""

import argparse
import json
from pathlib import Path

from .bars import OURS
from .evaluate import markdown


def main(argv: list[str] | None = None):
    """The command line."""
    parser = argparse.ArgumentParser(description="One table of several results.json.")
    parser.add_argument("results", type=Path, nargs="+", metavar="RESULTS.JSON")
    options = parser.parse_args(argv)
    groups = {}
    for path in options.results:
        for group, table in json.loads(path.read_text()).items():
            ours = table.get(OURS) or table["predictions"]  # without a checkpoint there is no one-step prediction
            groups.setdefault(group, {})[path.parent.name] = ours
    for group, table in groups.items():
        print(markdown(group, table))


if __name__ == "__main__":
    main()
