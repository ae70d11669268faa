"""Package the folders that the repository keeps at its root; everything else is in setup.cfg."""

import shutil
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

FOLDERS = ("data/prompts", "data/portraits", "experiments")


class BuildWithFolders(build_py):
    """Copies the folders into the package; an editable installation finds them at the root of the repository."""

    def run(self) -> None:
        """Build the package."""
        super().run()
        if not self.editable_mode:
            for folder in FOLDERS:
                unpacked = Path(self.build_lib, "fairness_dft", folder)
                shutil.copytree(folder, unpacked, ignore=shutil.ignore_patterns(".*"), dirs_exist_ok=True)


setup(cmdclass={"build_py": BuildWithFolders})
