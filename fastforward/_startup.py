"""What ``fastforward_autoquant.pth`` runs at interpreter start when ``FF_AUTOQUANT`` is set: standard library only.

It waits for the program to import torch and then hands over to :mod:`fastforward.toggle`. A process that never imports
torch pays for one finder on ``sys.meta_path``, nothing else; hence no ``importlib.abc`` here, which is slow to load.
"""

import os
import sys
from typing import Any

VARIABLE = "FF_AUTOQUANT"
_OFF = frozenset({"", "0", "false", "no", "off"})


def enabled() -> bool:
    """Whether ``FF_AUTOQUANT`` asks for quantization (unset, empty, 0, no, off and false do not)."""
    return os.environ.get(VARIABLE, "").strip().lower() not in _OFF


class TorchFinder:
    """A meta-path finder that loads torch as any other would and installs the toggle right after it."""

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> Any:
        """Return torch's own spec with a loader that tells us when it is done; None for every other module."""
        if fullname != "torch" or self not in sys.meta_path:
            return None
        sys.meta_path.remove(self)
        for finder in list(sys.meta_path):
            spec = finder.find_spec(fullname, path, target)
            if spec is not None:
                _install_after(spec.loader)
                return spec
        return None


def _install_after(loader: Any) -> None:
    """Shadow ``exec_module`` on this one loader: its type and its other methods stay what they are."""
    execute = loader.exec_module

    def exec_module(module: Any) -> None:
        del loader.exec_module
        execute(module)
        _install_toggle()

    loader.exec_module = exec_module


def _install_toggle() -> None:
    try:
        from fastforward import toggle

        toggle.install()
    except Exception as error:  # the user's program must run, quantized or not; it is told why
        print(f"fastforward: {VARIABLE} has no effect: {type(error).__name__}: {error}", file=sys.stderr)


def main() -> None:
    """Prepare the toggle if ``FF_AUTOQUANT`` asks for it; calling it again changes nothing."""
    if not enabled():
        return
    if "torch" in sys.modules:
        _install_toggle()
    elif not any(isinstance(finder, TorchFinder) for finder in sys.meta_path):
        sys.meta_path.insert(0, TorchFinder())


main()
