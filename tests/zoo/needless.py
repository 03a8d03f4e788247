"""Needless quantizers: sites and quantizers that have nothing to do, once a run has shown what the model does.

In the text form, a site that no floating tensor reaches although ``example_inputs`` said so. In the execution form, a
quantizer that calibration left in place although no floating tensor reaches it, or although nothing that multiplies, or that
reads a table of vectors, uses its value.
"""

import copy
import sys
import warnings

import torch

import fastforward as ff
from fastforward.autoquant.writer import BasicCodeWriter
from fastforward.calibration.flow import record_flow
from fastforward.nn import module as quantized_modules
from fastforward.nn.module import stubs_live
from fastforward.nn.quantizer import Quantizer, recording
from tests.zoo.entry import Entry, Inputs
from tests.zoo.stubs import run
from tests.zoo.values import differences

_MODULE = "zoo_text_after_evidence"


class _Seen:
    """Which stubs and quantizers a floating tensor passed."""

    def __init__(self) -> None:
        self.ids: set[int] = set()

    def record(self, quantizer: Quantizer, tensor_in: torch.Tensor, tensor_out: torch.Tensor) -> torch.Tensor:
        if tensor_in.is_floating_point():
            self.ids.add(id(quantizer))
        return tensor_out


def in_text(entry: Entry) -> tuple[list[str], list[str]]:
    """Render a model with ``example_inputs`` and run what was generated.

    Returns:
        Sites of the generated classes, ``class.site``, that no floating tensor reached in any instance; and where outputs
        differ from the float model's.
    """
    data = entry.arguments()
    expected = run(entry.make(), data).outputs
    registered = dict(ff.nn.conversion.quantized_module_map())
    model = entry.make()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            ff.autoquantize(
                model,
                auto_import=True,
                code_writer=BasicCodeWriter(_MODULE),
                example_inputs=ff.Call(*copy.deepcopy(data)),
            )
        made = [cls for cls in vars(sys.modules.pop(_MODULE)).values() if getattr(cls, "__module__", "") == _MODULE]
    finally:
        quantized_modules._module_map.clear()
        quantized_modules._module_map.update(registered)
    classes = {cls.float_class: cls for cls in made if isinstance(cls, type)}
    model = ff.quantize_model(model, extra_conversion=classes)
    seen = _Seen()
    with stubs_live(model), recording(seen):
        outputs = run(model, data).outputs
    sites: dict[str, bool] = {}
    for part in model.modules():
        if type(part) in classes.values():
            for name, quantizer in part.own_quantizers().items():
                site = f"{type(part).__qualname__}.{name}"
                sites[site] = sites.get(site, False) or id(quantizer) in seen.ids
    return sorted(site for site, reached in sites.items() if not reached), differences(expected, outputs, "output")


def in_memory(model: torch.nn.Module, data: Inputs) -> list[str]:
    """Active quantizers of a calibrated model that no floating tensor reaches, or whose value nothing multiplies."""
    flow = record_flow(model, lambda: run(model, data).outputs)
    governing = flow.governed()
    return sorted(
        name
        for name, part in model.named_modules()
        if isinstance(part, Quantizer) and not part.is_stub() and (name not in flow.reached or name not in governing)
    )
