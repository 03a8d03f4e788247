"""``ff.report``: one self-contained HTML page about a quantized model."""

import html
import linecache
from pathlib import Path

import torch

from fastforward.calibration.batches import Batches, Data
from fastforward.calibration.flow import eager, in_eval_mode, quantizer_names
from fastforward.diagnostics.covering import Coverage, measure
from fastforward.diagnostics.site_values import SiteValues, ValueRecorder
from fastforward.exceptions import QuantizationError
from fastforward.nn.quantizer import recording

_STYLE = """
body { font: 14px/1.45 system-ui, sans-serif; margin: 2em auto; max-width: 1200px; color: #222; }
table { border-collapse: collapse; width: 100%; margin: 1em 0; font-size: 12px; }
th, td { text-align: left; padding: 3px 8px; border-bottom: 1px solid #ddd; vertical-align: top; }
tr.float td { background: #fff3f0; } tr.integer td { background: #eefaf0; }
code { font-size: 12px; white-space: pre-wrap; } .bad { color: #b00020; font-weight: 600; }
svg { display: block; } .sites td:first-child { word-break: break-all; max-width: 320px; }
"""


def report(model: torch.nn.Module, data: Data, path: str | Path) -> Path:
    """Run the data through a quantized model and write what its quantizers saw, as one HTML file without links.

    Args:
        model: A quantized or converted model.
        data: As in ``ff.quantize``.
        path: File to write; an existing one is replaced.

    Returns:
        The path.

    Raises:
        QuantizationError: Nothing in the model is quantized.
    """
    batches = Batches(data)
    values = ValueRecorder()
    with in_eval_mode(model), eager():
        found = measure(model, lambda: batches.run_first(model))
        with recording(values):
            batches.run(model, "report", progress=False)
    names = quantizer_names(model)
    sites = [(names[key], site) for key, site in values.sites.items() if key in names]
    if not sites and not found.integer_share:
        msg = (
            f"{type(model).__name__} has no active quantizers: call ff.quantize(model, data) before asking for a report"
        )
        raise QuantizationError(msg)
    target = Path(path)
    target.write_text(page(type(model).__name__, found, sites), encoding="utf-8")
    return target


def page(name: str, found: Coverage, sites: list[tuple[str, SiteValues]]) -> str:
    """The page as HTML text."""
    title = html.escape(f"Quantization of {name}")
    return (
        f"<!doctype html><html lang='en'><head><meta charset='utf-8'><title>{title}</title>"
        f"<style>{_STYLE}</style></head><body><h1>{title}</h1><pre>{html.escape(found.summary())}</pre>"
        f"<h2>Sites</h2>{_site_table(sites)}<h2>Operators</h2>{found.to_html()}</body></html>\n"
    )


def _site_table(sites: list[tuple[str, SiteValues]]) -> str:
    titles = ("site", "source", "range", "seen", "values", "clipped", "SQNR dB")
    head = "<tr>" + "".join(f"<th>{title}</th>" for title in titles) + "</tr>"
    rows = "\n".join(_site_row(name, site) for name, site in sorted(sites, key=lambda pair: pair[1].sqnr))
    return f'<table class="sites"><thead>{head}</thead><tbody>\n{rows}\n</tbody></table>'


def _site_row(name: str, site: SiteValues) -> str:
    metadata = site.metadata
    source = linecache.getline(metadata.file, metadata.line).strip() if metadata.file and metadata.line else ""
    where = f"{Path(metadata.file).name}:{metadata.line}" if metadata.file else metadata.operator or ""
    low, high = site.bounds
    noisy = ' class="bad"' if site.sqnr < 20 else ""
    cells = (
        html.escape(name),
        f"{html.escape(where)}<br><code>{html.escape(source)}</code>",
        f"{low:.4g} to {high:.4g}",
        f"{site.low:.4g} to {site.high:.4g}",
        histogram_svg(site.histogram.tolist()),
        f"{site.clipped_share:.3%}",
        f"<span{noisy}>{site.sqnr:.1f}</span>",
    )
    return "<tr>" + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>"


def histogram_svg(counts: list[float], width: int = 160, height: int = 32) -> str:
    """A small bar chart of counts, on a logarithmic scale so that tails show."""
    heights = torch.log1p(torch.tensor(counts, dtype=torch.float64))
    tallest = max(float(heights.max()), 1e-9) if counts else 1.0
    step = width / max(len(counts), 1)
    bars = "".join(
        f'<rect x="{index * step:.1f}" y="{height - height * float(value) / tallest:.1f}" width="{step * 0.9:.1f}" '
        f'height="{height * float(value) / tallest:.1f}" fill="#3a6ea5"/>'
        for index, value in enumerate(heights)
        if value > 0
    )
    return f'<svg width="{width}" height="{height}" role="img">{bars}</svg>'
