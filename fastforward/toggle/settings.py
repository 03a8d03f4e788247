"""The environment variables of the toggle: ``FF_AUTOQUANT`` and those that start with it."""

import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch

from fastforward import _startup


@dataclass(frozen=True)
class Settings:
    """The environment variables of the toggle, read once."""

    scheme: str = "w8a8"
    calibration: int = 8
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    report: str | None = None
    debug: bool = False

    @classmethod
    def from_environment(cls) -> "Settings":
        """Read ``FF_AUTOQUANT`` and ``FF_AUTOQUANT_*``.

        Raises:
            ValueError: A variable has a value that means nothing.
        """
        value = os.environ.get(_startup.VARIABLE, "1").strip()
        return cls(
            scheme="w8a8" if value.lower() in {"1", "true", "yes", "on"} else value,
            calibration=_positive("CALIBRATION", 8),
            include=_names("INCLUDE"),
            exclude=_names("EXCLUDE"),
            report=_variable("REPORT") or None,
            debug=_variable("DEBUG").lower() not in {"", "0", "false", "no", "off"},
        )

    def left_out(self, root: torch.nn.Module) -> Callable[[str, torch.nn.Module], bool]:
        """A function ``(path, submodule of root) -> bool``: whether it stays as it is."""
        classes = {path: f"{type(module).__module__}.{type(module).__qualname__}" for path, module in _modules(root)}

        def left_out(path: str, module: torch.nn.Module) -> bool:
            del module
            names = {path, *(classes[above] for above in _with_ancestors(path) if above in classes)}
            return _any_within(names, self.exclude) or bool(self.include and not _any_within(names, self.include))

        return left_out


def _variable(name: str) -> str:
    return os.environ.get(f"{_startup.VARIABLE}_{name}", "").strip()


def _names(variable: str) -> tuple[str, ...]:
    return tuple(name.strip() for name in _variable(variable).split(",") if name.strip())


def _positive(variable: str, default: int) -> int:
    text = _variable(variable)
    if text and not (text.isdigit() and int(text) > 0):
        msg = f"{_startup.VARIABLE}_{variable} must be a positive number of batches, got {text!r}"
        raise ValueError(msg)
    return int(text) if text else default


def _any_within(names: Iterable[str], roots: tuple[str, ...]) -> bool:
    return any(name == root or name.startswith(f"{root}.") for name in names for root in roots)


def _modules(root: torch.nn.Module) -> list[tuple[str, torch.nn.Module]]:
    return list(root.named_modules(remove_duplicate=False))


def _with_ancestors(path: str) -> list[str]:
    """``"a.b"`` gives ``["", "a", "a.b"]``."""
    parts = path.split(".") if path else []
    return [".".join(parts[:count]) for count in range(len(parts) + 1)]
