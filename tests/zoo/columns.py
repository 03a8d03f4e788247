"""What the zoo checks of every model, as columns: an entry in, a record out that fits on a line of JSON.

A record always holds ``good``, and ``problems`` in words; the rest is what the summary adds up.
"""

import warnings
from collections.abc import Callable
from typing import Any

import torch

import fastforward as ff
from fastforward.exceptions import QuantizationWarning
from fastforward.nn.conversion import has_forward
from tests.zoo import compiled, compiled_integers, integers, needless, stubs, text
from tests.zoo.entry import Entry
from tests.zoo.multiplied import quantize, work
from tests.zoo.outside import operators_outside

Record = dict[str, Any]


def evaluation(entry: Entry) -> Record:
    """With stubs only: outputs, buffers and random state of a run in evaluation mode, to the last bit."""
    return _record(stubs.check(entry, training=False))


def training(entry: Entry) -> Record:
    """The same in training mode, and every gradient."""
    if entry.why_not_train:
        return _record([], skipped=entry.why_not_train)
    return _record(stubs.check(entry, training=True))


def operators(entry: Entry) -> Record:
    """Floating operators outside any site, operators that the table does not know, modules and functions left as they are."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model = ff.quantize_model(entry.make())
        found = operators_outside(entry, model)
    surrogates = [str(w.message) for w in caught if issubclass(w.category, QuantizationWarning)]
    surrogates += [
        f"{path or 'the model'} is a plain {type(part).__qualname__}"
        for path, part in model.named_modules()
        if not isinstance(part, (ff.nn.QuantizedModule, ff.nn.Quantizer)) and has_forward(type(part))
    ]
    unknown = [f"unknown operator: {where}" for where in found.unknown]
    return _record(
        unknown + surrogates,
        ran=found.total,
        outside=dict(found.outside),
        unknown=len(found.unknown),
        surrogates=len(surrogates),
    )


def products(entry: Entry) -> Record:
    """W8A8 calibrated and run: multiply-accumulates on quantized operands, SQNR, quantizers with nothing to do."""
    if not entry.multiplies:
        return _record([], skipped="multiplies nothing")
    data = entry.arguments()
    model = quantize(entry, data)
    done = work(entry, model)
    idle = needless.in_memory(model, data)
    problems = [f"float: {where}" for where in done.floating] + [f"needless: {name}" for name in idle]
    problems += [] if done.finite else ["the output is not finite"]
    problems += [] if done.total else ["nothing was multiplied"]
    return _record(problems, macs=done.total, quantized=done.quantized, sqnr=done.sqnr, needless=len(idle))


def text_form(entry: Entry) -> Record:
    """Generated classes, imported: equal to the float model with stubs, and to the execution form with quantizers."""
    if entry.name in text.EXCLUDED:
        return _record([], skipped=text.EXCLUDED[entry.name])
    found = text.check(entry)
    without_text = {name: why for name, why in found.excluded.items() if why != text.NO_SITES}
    return _record(
        found.differences,
        rendered=found.rendered,
        excluded=without_text,
        without_sites=len(found.excluded) - len(without_text),
        shared=found.shared,
        verbatim=list(found.verbatim),
    )


def evidence(entry: Entry) -> Record:
    """The text form after ``example_inputs``: equal outputs, and sites left although no floating tensor reaches them."""
    if entry.name in text.EXCLUDED:
        return _record([], skipped=text.EXCLUDED[entry.name])
    idle, wrong = needless.in_text(entry)
    return _record([*wrong, *(f"needless: {name}" for name in idle)], needless=len(idle))


def compilation(entry: Entry) -> Record:
    """``torch.compile(fullgraph=True)``, where the float model compiles so."""
    found = compiled.check(entry)
    if found.why_not:
        return _record([], skipped=found.why_not)
    problems = [f"stubs: {line}" for line in found.stubs] + [f"live: {line}" for line in found.live]
    return _record(problems, stubs=not found.stubs, live=not found.live)


def conversion(entry: Entry) -> Record:
    """``ff.convert``, and what integer layers compute beside what their simulation did."""
    if not entry.multiplies:
        return _record([], skipped="multiplies nothing")
    found = integers.check(entry)
    return _record(found.problems, integer=found.integer, floating=found.floating, sqnr=found.sqnr)


def fused(entry: Entry) -> Record:
    """A converted model's program after the pass for integer layers, run operator by operator, beside the eager model."""
    return _compiled_integers(entry, inductor=False)


def inductor(entry: Entry) -> Record:
    """A converted model compiled by Inductor beside the eager one."""
    return _compiled_integers(entry, inductor=True)


def _compiled_integers(entry: Entry, *, inductor: bool) -> Record:
    if not entry.multiplies:
        return _record([], skipped="multiplies nothing")
    found = compiled_integers.check(entry, inductor=inductor)
    return _record(found.problems, whole=found.whole, sqnr=found.same, operators=found.operators)


COLUMNS: dict[str, Callable[[Entry], Record]] = {
    "eval": evaluation,
    "train": training,
    "operators": operators,
    "products": products,
    "evidence": evidence,
    "text": text_form,
    "compile": compilation,
    "integer": conversion,
    "fused": fused,
    "inductor": inductor,
}


def measured(entry: Entry, column: str) -> Record:
    """One column of one model; an exception is a problem like any other."""
    torch.manual_seed(0)
    try:
        return COLUMNS[column](entry)
    except Exception as error:  # noqa: BLE001 - one broken model must not hide the others
        return _record([f"{type(error).__name__}: {str(error).strip()[:500]}"])


def _record(problems: list[str], **found: Any) -> Record:
    return {"good": not problems, "problems": problems[:20], **found}
