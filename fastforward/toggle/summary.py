"""The last words of a program under the toggle: what was quantized, and what was not and why."""

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from fastforward.diagnostics.covering import Coverage
from fastforward.diagnostics.reporting import report
from fastforward.exceptions import FastForwardError
from fastforward.toggle.session import Session
from fastforward.toggle.settings import Settings


def summary(settings: Settings, sessions: Sequence[Session], left_alone: Mapping[str, str]) -> str:
    """One line: scheme, and for each root its modules, operators and multiply-accumulates quantized.

    Args:
        settings: The toggle's variables.
        sessions: One for each root module.
        left_alone: Class of a module that could have been a root -> why it is none.
    """
    parts = [_describe(session) for session in sessions]
    parts += [f"{name} stays float ({reason})" for name, reason in left_alone.items()]
    if not parts:
        parts = ["nothing was quantized: no module with a quantizable parameter was called in this process"]
    return f"fastforward: {settings.scheme}: {'; '.join(parts)}"


def _describe(session: Session) -> str:
    coverage = session.coverage
    if coverage is None:
        return f"{session.name} stays float ({session.failure or 'no call of it ended'})"
    operators = coverage.multiplying
    done = sum(row.quantized for row in operators)
    text = (
        f"{session.name}: {session.quantized_modules} modules, {done} of {len(operators)} operators, "
        f"{coverage.share:.1%} of multiply-accumulates quantized"
    )
    notes = [_float_operators(coverage)] if done < len(operators) else []
    if session.phase.observing:
        notes.append(f"still observing: fewer than {session.settings.calibration} batches in eval mode")
    if session.failure:
        notes.append(session.failure)
    if session.phase.refused:
        notes.append(f"{session.phase.refused} tensors with NaN or infinity were not observed")
    return f"{text} ({'; '.join(notes)})" if notes else text


def _float_operators(coverage: Coverage) -> str:
    worst = max((row for row in coverage.multiplying if not row.quantized), key=lambda row: row.macs)
    return f"float, for example: {worst.operator} at {worst.place}, {worst.reason or 'no site'}"


def write_reports(settings: Settings, sessions: Sequence[Session]) -> None:
    """Write the report of each root: of the first to the path asked for, of the others beside it with a number."""
    if settings.report is None:
        return
    path = Path(settings.report)
    for number, session in enumerate((s for s in sessions if s.kept is not None), 1):
        assert session.kept is not None
        root, batch = session.kept
        session.settle()
        target = path if number == 1 else path.with_stem(f"{path.stem}-{number}")
        try:
            report(root, [batch], target)
        except (FastForwardError, OSError) as error:
            print(f"fastforward: no report on {session.name}: {error}", file=sys.stderr)
