"""``python -m tests.zoo [PART OF A NAME ...]``: every column of every model whose name holds a part, and the totals.

With ``--results FILE`` each record is appended to the file at once, and what the file holds already is not measured again:
a sweep can be stopped and taken up, or be shared by several processes with ``--columns``.
"""

import argparse
import json
import sys
import time
import warnings
from pathlib import Path

import torch

from tests.zoo.columns import COLUMNS, Record, measured
from tests.zoo.registry import registry
from tests.zoo.summary import Records, problems, summary


def main(arguments: list[str]) -> int:
    """Measure, print, and return how many records are not good."""
    options = _options(arguments)
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    known = _read(options.results)
    names = [n for n in registry().entries if not options.parts or any(part in n for part in options.parts)]
    for name in [] if options.summary else names:
        for column in options.columns:
            done = known.get((name, column))
            if done is None or (options.failed and not done["good"]):
                known[name, column] = _measure(name, column, options.results)
    chosen: Records = {key: record for key, record in known.items() if key[0] in set(names)}
    print(summary(chosen))
    print(problems(chosen))
    return sum(not record["good"] for record in chosen.values())


def _options(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.zoo", description="Check the models of the zoo.")
    parser.add_argument("parts", nargs="*", help="parts of names; all models without any")
    parser.add_argument(
        "--columns", type=lambda names: names.split(","), default=list(COLUMNS), help=", ".join(COLUMNS)
    )
    parser.add_argument("--results", type=Path, help="a file of records, read and appended to")
    parser.add_argument("--failed", action="store_true", help="measure again what the file says is not good")
    parser.add_argument("--summary", action="store_true", help="measure nothing, print what the file says")
    return parser.parse_args(arguments)


def _measure(name: str, column: str, results: Path | None) -> Record:
    started = time.process_time()
    record = measured(registry().entries[name], column)
    record["seconds"] = round(time.process_time() - started, 2)
    shown = "  ".join(f"{key} {value}" for key, value in record.items() if isinstance(value, (int, float, str)))
    print(f"{name:45} {column:10} {shown}", *record["problems"], sep="\n    ", flush=True)
    if results is not None:
        with results.open("a") as file:
            file.write(json.dumps({"model": name, "column": column, **record}) + "\n")
    return record


def _read(results: Path | None) -> Records:
    if results is None or not results.exists():
        return {}
    lines = [json.loads(line) for line in results.read_text().splitlines()]
    return {(line.pop("model"), line.pop("column")): line for line in lines}


if __name__ == "__main__":
    sys.exit(min(main(sys.argv[1:]), 125))
