"""Chooses the real objects that are held out, from the manifest of what was rendered, and writes their list.

    python -m evaluation.split --manifest data/objects/manifest.jsonl --output evaluation/objects.jsonl

Half are new objects of names that are trained (another armchair), half are of names of which no object is trained.
Both are spread over the categories: one of each in turn, in an order that `--seed` shuffles. A line of the list has
what the manifest says of an object, and `whole_name`, whether all objects of its name are left out of the training,
for `training.render --without`.
"""

import json
import random
from collections import defaultdict
from pathlib import Path

from zero123plus.files import write_file
from zero123plus.options import Parser, command, count, number

FIELDS = "object", "name", "category", "creator", "licence", "source"


def choose(records: list[dict], number: int, seed: int) -> list[dict]:
    """Chooses held-out objects.

    Args:
        records: of the manifest; those without a name or category are left alone.
        number: of objects of each half.
        seed: of the order.

    Raises:
        ValueError: if there are too few.
    """
    rng, by_name = random.Random(seed), defaultdict(list)
    for record in sorted(records, key=lambda record: record["object"]):
        if record.get("name") and record.get("category"):
            by_name[record["name"]].append(record)
    chosen, used = [], set()
    for whole_name in (False, True):  # of names with sisters, one object; then of the others, all
        names = [name for name, members in by_name.items() if name not in used and (whole_name or len(members) > 1)]
        rng.shuffle(names)
        queues = defaultdict(list)
        for name in names:
            queues[by_name[name][0]["category"]].append(name)
        order, found = sorted(queues), []
        while len(found) < number and any(queues.values()):
            found += [queues[category].pop() for category in order if queues[category]]
        if len(found) < number:
            raise ValueError(f"There are only {len(found)} names to hold out, but {number} are asked for.")
        used |= set(found[:number])
        for name in found[:number]:
            record = rng.choice(by_name[name])
            chosen.append({field: record.get(field) for field in FIELDS} | {"whole_name": whole_name})
    return sorted(chosen, key=lambda record: record["object"])


@command
def main(argv: list[str] | None = None):
    """The command line."""
    parser = Parser("Choose the real objects that are held out.")
    add = parser.add_argument
    add("--manifest", type=Path, required=True, help="of training.render")
    add("--output", type=Path, required=True, help="file of the list, which is replaced")
    add("--number", type=count, default=32, help="of objects of each half")
    add("--seed", type=number(int, 0), default=0, help="of the choice")
    o = parser.parse_args(argv)
    records = [json.loads(line) for line in o.manifest.read_text().splitlines()]
    chosen = choose(records, o.number, o.seed)
    write_file(o.output, "".join(f"{json.dumps(record, ensure_ascii=False)}\n" for record in chosen).encode())


if __name__ == "__main__":
    main()
