"""``python -m tests.zoo [PART OF A NAME ...]``: one line for each model, and the totals."""

import sys
import time
import warnings
from collections import Counter

import torch

from tests.zoo.entry import Entry
from tests.zoo.multiplied import work
from tests.zoo.outside import operators_outside
from tests.zoo.registry import registry
from tests.zoo.stubs import check


def main(parts: list[str]) -> int:
    """Check the models whose name holds one of ``parts``; return how many failed."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    chosen = [e for e in registry().entries.values() if not parts or any(part in e.name for part in parts)]
    totals: Counter[str] = Counter()
    places: Counter[str] = Counter()
    print(
        f"{'model':50} {'stubs':11} {'operators':>9} {'outside':>7} {'MACs':>12} {'on int8':>8} {'SQNR':>6} {'time':>6}"
    )
    for entry in chosen:
        started = time.perf_counter()
        try:
            line, good = _line(entry, totals, places)
        except Exception as error:  # noqa: BLE001 - one broken model must not hide the others
            line, good = f"{type(error).__name__}: {error}", False
        totals["failed"] += not good
        print(f"{entry.name:50} {line} {time.perf_counter() - started:5.1f}s{'' if good else '  FAILED'}", flush=True)
    _summary(len(chosen), totals, places)
    return totals["failed"]


def _line(entry: Entry, totals: Counter[str], places: Counter[str]) -> tuple[str, bool]:
    wrong = check(entry, training=False) + ([] if entry.why_not_train else check(entry, training=True))
    found = operators_outside(entry)
    outside = sum(found.outside.values())
    totals["operators"] += found.total
    totals["outside"] += outside
    places.update(found.outside)
    stubs = "identical" if not wrong else f"{len(wrong)} differ"
    text = f"{stubs:11} {found.total:9} {outside:7}"
    if not entry.multiplies:
        return f"{text} {'-':>12} {'-':>8} {'-':>6}", not wrong
    done = work(entry)
    totals["macs"] += done.total
    totals["quantized"] += done.quantized
    text = f"{text} {done.total:12} {100 * done.share:7.2f}% {done.sqnr:6.1f}"
    return "\n".join(
        [text, *(f"    {p}" for p in wrong[:5] + list(done.floating)[:5])]
    ), not wrong and done.share == 1 and done.finite


def _summary(models: int, totals: Counter[str], places: Counter[str]) -> None:
    share = 100 * totals["outside"] / max(totals["operators"], 1)
    on_grid = 100 * totals["quantized"] / max(totals["macs"], 1)
    print(f"\n{models} models, {totals['failed']} failed")
    print(f"floating operators: {totals['operators']} ran, {totals['outside']} outside any site ({share:.2f} %)")
    print(f"multiply-accumulates: {totals['macs']}, {on_grid:.3f} % on quantized operands")
    for where, count in places.most_common():
        print(f"  outside: {count:5} x {where}")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
