"""Where generated code goes: a file, a stream, or nowhere. Code in, the same code out; nothing else is ever written."""

import os
import sys
import tempfile
from pathlib import Path
from typing import Protocol, TextIO


class CodeWriter(Protocol):
    """Takes generated code. ``module_name`` is what the code's module will be called."""

    @property
    def module_name(self) -> str: ...

    def write(self, code: str) -> None:
        """Take ``code``."""


class BasicCodeWriter:
    """Keeps the code in ``code``.

    Args:
        module_name: Name of the module that the code makes.
    """

    def __init__(self, module_name: str = "quantized") -> None:
        self.module_name = module_name
        self.code = ""

    def write(self, code: str) -> None:
        """Keep ``code``."""
        self.code = code


class TextIOWriter(BasicCodeWriter):
    """Writes the code to a text stream.

    Args:
        module_name: Name of the module that the code makes.
        writer: The stream.
    """

    def __init__(self, module_name: str = "quantized", *, writer: TextIO) -> None:
        super().__init__(module_name)
        self.writer = writer

    def write(self, code: str) -> None:
        super().write(code)
        self.writer.write(code)


class StdoutWriter(TextIOWriter):
    """Prints the code.

    Args:
        module_name: Name of the module that the code makes.
    """

    def __init__(self, module_name: str = "quantized") -> None:
        super().__init__(module_name, writer=sys.stdout)


class FileWriter(BasicCodeWriter):
    """Writes the code to a file, whole or not at all.

    Args:
        output_path: A ``.py`` file; any other path is a package directory and gets an ``__init__.py``.
        force_overwrite: Whether an existing file may be replaced.

    Raises:
        FileExistsError: The file exists and ``force_overwrite`` is not given; it stays as it is.
    """

    def __init__(self, output_path: str | os.PathLike[str], force_overwrite: bool = False) -> None:
        path = Path(output_path)
        super().__init__(path.stem if path.suffix == ".py" else path.name)
        self.path = path if path.suffix == ".py" else path / "__init__.py"
        self.force_overwrite = force_overwrite
        self._check()

    def _check(self) -> None:
        if self.path.exists() and not self.force_overwrite:
            msg = f"{self.path} exists; pass force_overwrite=True to replace it"
            raise FileExistsError(msg)

    def write(self, code: str) -> None:
        super().write(code)
        self._check()
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(
            "w", encoding="utf-8", dir=self.path.parent, prefix=f".{self.path.name}.", delete=False
        ) as file:
            file.write(code)
        os.chmod(file.name, 0o644)
        os.replace(file.name, self.path)
