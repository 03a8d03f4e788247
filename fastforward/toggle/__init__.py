"""What ``FF_AUTOQUANT`` does once torch is loaded: quantize each root module in place at its first call.

``torch.nn.Module.__call__`` is wrapped. The outermost module that is called and owns a quantizable parameter becomes a
root: it gets stubs, its first calls are recorded, and its sites get quantizers that find their own ranges. In training
mode these follow moving averages and the forward pass simulates; in eval mode the first ``FF_AUTOQUANT_CALIBRATION``
batches run in float and are observed, later ones simulate.
"""

import atexit
import functools
import multiprocessing
import sys
import traceback
import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

from fastforward.toggle.settings import Settings

if TYPE_CHECKING:
    from fastforward.toggle.session import Session

# Where torch's own wrappers keep the module that they wrap.
_WRAPPED = {
    "DistributedDataParallel": "module",
    "DataParallel": "module",
    "FullyShardedDataParallel": "_fsdp_wrapped_module",
    "OptimizedModule": "_orig_mod",
}


class Toggle:
    """Every module that was ever called, and the sessions of those that are roots.

    Args:
        settings: The environment variables.
        original: The ``torch.nn.Module.__call__`` that ours stands before.
    """

    def __init__(self, settings: Settings, original: Callable[..., Any]) -> None:
        self.settings = settings
        self.original = original
        self.sessions: list[Session] = []
        self.left_alone: dict[str, str] = {}
        # By id, because a lookup happens at every call of every module; entries go when their module goes.
        self.known: dict[int, Session | None] = {}

    def call(self, module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """What happens instead of ``module(*args, **kwargs)``."""
        key = id(module)
        session = self.known[key] if key in self.known else self._consider(module)
        if session is None:
            return self.original(module, *args, **kwargs)
        call = functools.partial(self.original, module)
        return session.run(call, args, kwargs, _unwrapped(module).training)

    def _consider(self, module: torch.nn.Module) -> "Session | None":
        """Decide about a module that was never called before: a root, or nothing to us."""
        inner = _unwrapped(module)
        if id(inner) in self.known:
            return self._remember(module, self.known[id(inner)])
        reason = _why_no_root(inner)
        if reason is not None:
            if reason:
                self._leave(inner, reason)
            return self._remember(module, None)
        if _is_lazy(inner):
            return None  # a lazy module: its shapes, and so its classes, are there from the second call on
        for part in (*inner.modules(), module):
            if id(part) not in self.known:
                self._remember(part, None)
        session = self._begin(inner)
        self._remember(inner, session)
        return self._remember(module, session)

    def _begin(self, root: torch.nn.Module) -> "Session | None":
        from fastforward.toggle.session import Session

        try:
            session = Session(root, self.settings)
        except Exception as error:  # the program must run, quantized or not; the last line says why
            self._leave(root, f"{type(error).__name__}: {error}")
            if self.settings.debug:
                traceback.print_exc()
            return None
        self.sessions.append(session)
        return session

    def _leave(self, module: torch.nn.Module, reason: str) -> None:
        self.left_alone[f"{type(module).__module__}.{type(module).__qualname__}"] = reason

    def _remember(self, module: torch.nn.Module, session: "Session | None") -> "Session | None":
        key = id(module)
        if key not in self.known:
            weakref.finalize(module, self.known.pop, key, None).atexit = False
        self.known[key] = session
        return session


def _unwrapped(module: torch.nn.Module) -> torch.nn.Module:
    while (attribute := _WRAPPED.get(type(module).__name__)) and isinstance(
        getattr(module, attribute, None), torch.nn.Module
    ):
        module = getattr(module, attribute)
    return module


def _why_no_root(module: torch.nn.Module) -> str | None:
    """None if ``module`` can be a root; otherwise why not, empty where that is no news."""
    if not _is_lazy(module) and not any(p.is_floating_point() and p.dim() > 1 for p in module.parameters()):
        return ""
    if getattr(module, "_is_replica", False):
        return "DataParallel makes new copies at every call; use DistributedDataParallel"
    if isinstance(module, torch.jit.ScriptModule):
        return "a ScriptModule has no Python source"
    if isinstance(module, torch.fx.GraphModule):
        return "a traced graph; quantize the module that it was traced from"
    return None


def _is_lazy(module: torch.nn.Module) -> bool:
    return any(torch.nn.parameter.is_lazy(p) for p in module.parameters())


_active: Toggle | None = None


def install() -> None:
    """Wrap ``torch.nn.Module.__call__`` and print the summary at exit; a second call does nothing.

    Raises:
        ValueError: A variable of the environment has a value that means nothing.
    """
    global _active  # noqa: PLW0603
    if _active is not None:
        return
    toggle = _active = Toggle(Settings.from_environment(), torch.nn.Module.__call__)
    _wrap_module_call(toggle)
    atexit.register(_say_goodbye, toggle)


def _wrap_module_call(toggle: Toggle) -> None:
    original, known = toggle.original, toggle.known

    @functools.wraps(original)
    def call(self: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
        # Part of a known root, by far the most frequent case; and while dynamo traces, nothing can be decided.
        if torch.compiler.is_compiling() or known.get(id(self), toggle) is None:
            return original(self, *args, **kwargs)
        return toggle.call(self, args, kwargs)

    torch.nn.Module.__call__ = call  # type: ignore[method-assign]


def _say_goodbye(toggle: Toggle) -> None:
    if toggle.sessions or toggle.left_alone or not _works_for_another_process():
        from fastforward.toggle.summary import summary, write_reports

        for session in toggle.sessions:
            session.finish()
        print(summary(toggle.settings, toggle.sessions, toggle.left_alone), file=sys.stderr)
        write_reports(toggle.settings, toggle.sessions)


def _works_for_another_process() -> bool:
    """Whether it is no news that this process called no model: a worker of a program, or ``torchrun`` itself."""
    agent = "torch.distributed.elastic.agent.server.local_elastic_agent"
    return multiprocessing.parent_process() is not None or agent in sys.modules
