"""The command line: ``python -m fastforward run|inspect|quantize|report``."""

import argparse
import importlib
import importlib.util
import os
import sys
import types
from collections.abc import Callable, Sequence
from typing import Any

from fastforward import _startup

_MODEL_HELP = "model, or function without arguments that builds it, as pkg.mod:name"
_DATA_HELP = "iterable of batches, or function without arguments that yields them, as pkg.mod:name"


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status."""
    arguments = _parser().parse_args(argv)
    # The directory from which the user names modules; `-m` puts it there, an installed launcher would not.
    if "" not in sys.path and os.getcwd() not in sys.path:
        sys.path.insert(0, "")
    try:
        arguments.handler(arguments)
    except _UsageError as error:
        print(f"fastforward: {error}", file=sys.stderr)
        return 2
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m fastforward", description="Quantize PyTorch models.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    run = commands.add_parser("run", help="run a script with its models quantized, as FF_AUTOQUANT does")
    run.add_argument("--scheme", default="1", help="scheme, or path of a YAML configuration (default: w8a8)")
    run.add_argument("-m", dest="as_module", action="store_true", help="TARGET is a module, as in python -m")
    run.add_argument("target", help="script, or module with -m")
    run.add_argument("arguments", nargs=argparse.REMAINDER, help="arguments of the script")
    run.set_defaults(handler=_run)

    inspect = commands.add_parser("inspect", help="print a class or function beside its rewritten source")
    inspect.add_argument("name", help="pkg.mod.Class or pkg.mod.function")
    inspect.set_defaults(handler=_inspect)

    quantize = commands.add_parser("quantize", help="quantize and calibrate a model; save its quantization state")
    _add_model_arguments(quantize)
    quantize.add_argument("--output", metavar="PATH", help="write the quantization state here (safetensors)")
    quantize.set_defaults(handler=_quantize)

    report = commands.add_parser("report", help="quantize a model and write the HTML report")
    _add_model_arguments(report)
    report.add_argument("--output", metavar="PATH", required=True, help="write the page here")
    report.set_defaults(handler=_report)
    return parser


def _add_model_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", help=_MODEL_HELP)
    parser.add_argument("--data", required=True, help=_DATA_HELP)
    parser.add_argument("--scheme", default="w8a8", help="name of the scheme (default: %(default)s)")


class _UsageError(Exception):
    """Something on the command line cannot be found or used."""


# ---------------------------------------------------------------------- run
def _run(arguments: argparse.Namespace) -> None:
    os.environ[_startup.VARIABLE] = arguments.scheme
    _startup.main()
    sys.argv = [arguments.target, *arguments.arguments]
    if arguments.as_module:
        _run_module(arguments.target)
    else:
        _run_script(arguments.target)


def _run_script(path: str) -> None:
    if not os.path.exists(path):
        msg = f"no script {path!r}"
        raise _UsageError(msg)
    with open(path, "rb") as file:
        text = file.read()
    _replace_first_path(os.path.dirname(os.path.abspath(path)))
    # Text given as bytes honours the script's own encoding line.
    _execute(compile(text, path, "exec", dont_inherit=True), {"__file__": path, "__spec__": None, "__package__": None})


def _run_module(name: str) -> None:
    _replace_first_path(os.getcwd())
    spec = _find(name)
    if spec is not None and spec.submodule_search_locations is not None:
        spec = _find(f"{name}.__main__")
    code = spec.loader.get_code(spec.name) if spec is not None and hasattr(spec.loader, "get_code") else None
    if spec is None or code is None:
        msg = f"no module that can be run: {name!r}"
        raise _UsageError(msg)
    sys.argv[0] = spec.origin or name
    details = {"__file__": spec.origin, "__spec__": spec, "__package__": spec.parent, "__loader__": spec.loader}
    _execute(code, details)


def _find(name: str) -> Any:
    try:
        return importlib.util.find_spec(name)
    except ImportError:
        return None


def _replace_first_path(directory: str) -> None:
    """Give the script the ``sys.path`` that ``python script.py`` would: its directory instead of our first entry."""
    if sys.path and sys.path[0] in ("", os.getcwd()):
        sys.path[0] = directory
    else:
        sys.path.insert(0, directory)


def _execute(code: types.CodeType, details: dict[str, Any]) -> None:
    # Not runpy: it gives the script a temporary `__main__`, whose functions lose their globals before exit handlers
    # run and whose classes cannot be pickled for a spawned process afterwards.
    module = types.ModuleType("__main__")
    module.__dict__.update(details)
    sys.modules["__main__"] = module
    exec(code, module.__dict__)


# ---------------------------------------------------------------------- inspect, quantize, report
def _inspect(arguments: argparse.Namespace) -> None:
    import fastforward as ff

    shown = ff.show_source(_resolve(arguments.name))
    if shown is not None:
        print(shown)


def _quantize(arguments: argparse.Namespace) -> Any:
    import fastforward as ff

    model, data = _value(arguments.model), _value(arguments.data)
    quantized = ff.quantize(model, data, scheme=arguments.scheme)
    if getattr(arguments, "output", None):
        ff.save_quantization(quantized, arguments.output)
    return quantized


def _report(arguments: argparse.Namespace) -> None:
    import fastforward as ff

    model = ff.quantize(_value(arguments.model), _value(arguments.data), scheme=arguments.scheme)
    ff.report(model, _value(arguments.data), arguments.output)
    print(f"report written to {arguments.output}")


def _value(name: str) -> Any:
    """The object called ``pkg.mod:name``; a function or class other than a model is called to make it."""
    found = _resolve(name)
    if isinstance(found, (types.FunctionType, type)):
        make: Callable[[], Any] = found
        return make()
    return found


def _resolve(name: str) -> Any:
    """Import the longest prefix of a dotted name (``pkg.mod:attribute`` says where it ends), then follow attributes."""
    module_name, _, attributes = name.partition(":")
    parts = attributes.split(".") if attributes else []
    module = _import(module_name)
    while module is None and "." in module_name and not attributes:
        module_name, _, last = module_name.rpartition(".")
        parts.insert(0, last)
        module = _import(module_name)
    if module is None:
        msg = f"no module for {name!r}; name it as pkg.mod:name and run from its directory"
        raise _UsageError(msg)
    value: Any = module
    for part in parts:
        if not hasattr(value, part):
            msg = f"{module_name!r} has no {'.'.join(parts)!r}"
            raise _UsageError(msg)
        value = getattr(value, part)
    return value


def _import(name: str) -> types.ModuleType | None:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        # A missing import inside the module is the user's error, and is shown as it is.
        if error.name is not None and (name == error.name or name.startswith(f"{error.name}.")):
            return None
        raise


if __name__ == "__main__":
    sys.exit(main())
