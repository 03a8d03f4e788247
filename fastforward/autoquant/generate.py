"""`autoquantize`: a float model in, the text of its quantized classes out."""

import ast
import linecache
import os
import sys
import types
import warnings
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

import fastforward
from fastforward.autoquant.bind import engine_for
from fastforward.autoquant.classtext import ModuleText, StubPath
from fastforward.autoquant.evidence import sites_without_tensors
from fastforward.autoquant.imports import is_importable
from fastforward.autoquant.optable import OperatorTable
from fastforward.autoquant.recompile import Engine
from fastforward.autoquant.render import render
from fastforward.autoquant.writer import CodeWriter, FileWriter
from fastforward.exceptions import AutoquantError, QuantizationWarning

if TYPE_CHECKING:
    from fastforward.autoquant.patterns import PatternRule


@dataclass
class AutoQuantizedCode:
    """Generated code.

    Attributes:
        code: The text.
        pymodule: The module made from it; None unless ``auto_import`` was asked for.
        pymodule_name: Name of that module.
        unknown_operators: Calls of torch that the operator table does not cover, with file and line; they stay float.
        verbatim: What the text leaves as it is although execution in memory would quantize it: calls whose callee is
            known only at run time or cannot be written as text, methods and classes without text; with line and reason.
    """

    code: str
    pymodule: types.ModuleType | None
    pymodule_name: str
    unknown_operators: tuple[str, ...] = ()
    verbatim: tuple[str, ...] = ()


def autoquantize(
    module: torch.nn.Module,
    *,
    output_path: str | os.PathLike[str] | None = None,
    force_overwrite: bool = False,
    code_writer: CodeWriter | None = None,
    use_type_inference: bool = True,
    operator_table: OperatorTable | None = None,
    replacement_patterns: Sequence["PatternRule"] = (),
    auto_import: bool = False,
    example_inputs: Any = None,
) -> AutoQuantizedCode:
    """Write the quantized form of every class of a model that has no hand-written one.

    The model itself is not changed. Importing the generated module registers its classes, so that
    :func:`fastforward.quantize_model` uses them.

    Args:
        module: A float model.
        output_path: File to write the code to (a path without ``.py`` is a package directory); no file is written
            without it.
        force_overwrite: Whether an existing file may be replaced.
        code_writer: Receives the code instead of a file; see :mod:`fastforward.autoquant.writer`.
        use_type_inference: Whether annotations and the like decide what can be a tensor; otherwise literals alone do.
        operator_table: Operators with quantized forms; the bundled table if not given.
        replacement_patterns: Applied to the source before anything else.
        auto_import: Whether to execute the code as a module and register it in `sys.modules`.
        example_inputs: A batch that the model can run on (a tensor, a tuple of positional arguments, or a mapping of
            keyword arguments). Sites that saw no floating tensor are left out of the code.

    Returns:
        The code.

    Raises:
        TypeError: ``module`` is no module.
        ValueError: Both ``output_path`` and ``code_writer`` are given, or ``force_overwrite`` without a path.
        FileExistsError: The file exists and ``force_overwrite`` is not given; it is left as it is.
        AutoquantError: The model's own class cannot be rendered, or the code cannot be imported.

    Example:
        >>> import fastforward as ff, torch
        >>> print(ff.autoquantize(torch.nn.Softsign()).code.splitlines()[0])
        import fastforward
    """
    writer = _writer(module, output_path, force_overwrite, code_writer)
    engine = engine_for(operator_table, replacement_patterns)
    text, tree = _module_text(module, engine, use_type_inference)
    _check_importable(text, needed=auto_import or output_path is not None or example_inputs is not None)
    if example_inputs is not None:
        dropped = sites_without_tensors(module, text, tree, example_inputs)
        text, tree = _module_text(module, engine, use_type_inference, dropped)
    code = render(tree)
    name = writer.module_name if writer is not None else "quantized"
    pymodule = import_code(code, name) if auto_import else None
    if writer is not None:
        writer.write(code)
    unknown = dict.fromkeys(line for unit in text.graph.units() for line in unit.unknown)
    verbatim = dict.fromkeys(line for unit in text.graph.units() for line in unit.verbatim)
    return AutoQuantizedCode(code, pymodule, name, tuple(unknown), (*text.left_out, *verbatim))


def _writer(
    module: Any, output_path: str | os.PathLike[str] | None, force_overwrite: bool, code_writer: CodeWriter | None
) -> CodeWriter | None:
    if not isinstance(module, torch.nn.Module):
        msg = f"autoquantize: expected a torch.nn.Module, got {type(module).__name__}"
        raise TypeError(msg)
    if output_path is not None and code_writer is not None:
        msg = "autoquantize: give output_path or code_writer, not both"
        raise ValueError(msg)
    if force_overwrite and output_path is None:
        msg = "autoquantize: force_overwrite is about output_path, which is not given"
        raise ValueError(msg)
    return code_writer if output_path is None else FileWriter(output_path, force_overwrite)


def _module_text(
    module: torch.nn.Module,
    engine: Engine,
    use_type_inference: bool,
    dropped: Mapping[type, Collection[StubPath]] = types.MappingProxyType({}),
) -> tuple[ModuleText, ast.Module]:
    instances: dict[type, list[torch.nn.Module]] = {}
    for part in module.modules():
        instances.setdefault(type(part), []).append(part)
    text = ModuleText(engine, use_type_inference, dropped, instances)
    for cls in classes_to_render(module):
        try:
            if cls is not type(module) and not is_importable(cls):
                raise AutoquantError(_not_importable([cls]))
            text.add_class(cls, only_with_sites=cls.__module__.startswith("torch.nn."))
        except AutoquantError as error:
            if cls is type(module):
                raise
            text.leave_out(f"{cls.__qualname__} is left out: {error}", stacklevel=5)
    return text, text.tree()


def classes_to_render(module: torch.nn.Module) -> list[type[torch.nn.Module]]:
    """The classes in a model that run code of their own and have no hand-written quantized form, outermost first."""
    nn = fastforward.nn.conversion  # importing it registers the hand-written classes
    written, quantized = nn.quantized_module_map(), nn.QuantizedModule
    classes = dict.fromkeys(type(part) for part in module.modules())
    return [
        cls
        for cls in classes
        if not issubclass(cls, quantized)
        and getattr(cls.forward, "__name__", "") != "_forward_unimplemented"
        and not (cls in written and _is_hand_written(written[cls]))
    ]


def _is_hand_written(cls: type) -> bool:
    return cls.__module__.startswith("fastforward.")


def _check_importable(text: ModuleText, needed: bool) -> None:
    local = [cls for cls in text.stubs if not is_importable(cls)]
    if not local:
        return
    msg = _not_importable(local)
    if needed:
        raise AutoquantError(msg)
    warnings.warn(msg, QuantizationWarning, stacklevel=3)


def _not_importable(classes: Iterable[type]) -> str:
    names = ", ".join(f"{cls.__module__}.{cls.__qualname__}" for cls in classes)
    return f"a generated module cannot import {names}: define the class at the top level of a module"


def import_code(code: str, name: str) -> types.ModuleType:
    """Execute generated code as the module ``name``.

    Raises:
        AutoquantError: Something that the code names cannot be found.
    """
    if name in sys.modules:
        warnings.warn(f"the module {name!r} is replaced by generated code", QuantizationWarning, stacklevel=3)
    module = types.ModuleType(name)
    filename = f"<autoquantize {name}>"
    module.__file__ = filename
    linecache.cache[filename] = (len(code), None, code.splitlines(keepends=True), filename)
    before = sys.modules.get(name)
    sys.modules[name] = module
    try:
        exec(compile(code, filename, "exec", dont_inherit=True), module.__dict__)  # noqa: S102 - what auto_import asks for
    except BaseException as error:
        sys.modules.pop(name)
        if before is not None:
            sys.modules[name] = before
        if isinstance(error, (ImportError, NameError, AttributeError)):
            msg = f"the generated module {name!r} does not import: {error}"
            raise AutoquantError(msg) from error
        raise
    return module
