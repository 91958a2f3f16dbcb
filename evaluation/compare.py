"""Puts the results of several runs of `evaluation.evaluate` into one table, by the folders they lie in.

    python -m evaluation.compare out/ablations/*/results.json
    python -m evaluation.compare out/ablations/*/results.json --control as-is

With `--control` it shows each run's difference to that one: the mean over objects, and its standard error. What is
more than two standard errors from 0 is in bold type.
"""

import json
from pathlib import Path

from zero123plus.options import Parser, command

from .bars import OURS
from .evaluate import markdown, mean_and_error


def differences(ours: dict[str, dict], control: dict[str, dict]) -> tuple[dict, dict]:
    """Means of the objects' differences in each measure, and their standard errors.

    Args:
        ours: by object, its scores.
        control: the same objects' scores.

    Raises:
        ValueError: if the objects are not the same.
    """
    if ours.keys() != control.keys():
        raise ValueError(f"One has the objects {', '.join(ours)}, but the other {', '.join(control)}.")
    return mean_and_error([{key: ours[name][key] - control[name][key] for key in ours[name]} for name in ours])


@command
def main(argv: list[str] | None = None):
    """The command line."""
    parser = Parser("One table of several results.json.")
    parser.add_argument("results", type=Path, nargs="+", metavar="RESULTS.JSON")
    parser.add_argument("--control", help="folder of the one that the others are compared with, object by object")
    options = parser.parse_args(argv)
    tables = {path.parent.name: json.loads(path.read_text()) for path in options.results}
    if options.control and options.control not in tables:
        parser.error(f"`--control` {options.control} is none of {', '.join(tables)}.")
    groups = {}
    for name, results in tables.items():
        for group, table in results.items():
            # Without a checkpoint there is no one-step prediction
            groups.setdefault(group, {})[name] = table | {OURS: table.get(OURS) or table["predictions"]}
    for group, found in groups.items():
        if not options.control:
            print(markdown(group, {name: table[OURS] for name, table in found.items()}))
            continue
        try:
            control = found.pop(options.control)["objects"]
            both = {name: differences(table["objects"], control) for name, table in found.items()}
        except KeyError as error:
            raise SystemExit(f"`--control` needs {error} of {group} in each results.json: evaluate again.") from error
        except ValueError as error:
            raise SystemExit(f"`--control` {options.control}: {error} Score the same objects.") from error
        means, errors = ({name: pair[i] for name, pair in both.items()} for i in (0, 1))
        print(markdown(f"{group} ({len(control)}), less {options.control}", means, errors, mark=2))


if __name__ == "__main__":
    main()
