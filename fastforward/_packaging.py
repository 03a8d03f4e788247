"""Build step for editable installs: setuptools loads this file alone, before anything is installed.

A regular wheel gets the two start-up files through ``package_data``; an editable wheel holds no package data, so
they are added to it here.
"""

import pathlib
import zipfile

from setuptools.command.editable_wheel import editable_wheel

STARTUP_FILES = ("fastforward_autoquant.pth", "fastforward_autoquant.start")


class EditableWheelWithStartup(editable_wheel):  # type: ignore[misc, unused-ignore]  # setuptools is untyped in places
    """Adds the start-up files of ``FF_AUTOQUANT`` to the top level of an editable wheel."""

    def run(self) -> None:
        super().run()
        for wheel in pathlib.Path(self.dist_dir).glob("*editable*.whl"):
            with zipfile.ZipFile(wheel, "a") as archive:
                for name in STARTUP_FILES:
                    archive.write(name, name)
