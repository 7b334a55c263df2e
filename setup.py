"""Packaging beyond ``pyproject.toml``: a wheel carries ``examples/`` inside the package ``pipeline``.

The ready configs lie where users look for them, at the top of a checkout, and an installed ``crosslane`` needs
them as well. A symbolic link would do, where every tool on the way from one machine to another kept it.
"""

from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

EXAMPLES = Path(__file__).resolve().parent / "examples"


class BuildWithExamples(build_py):
    """Copies the packages, and then the examples; an editable install finds both in the checkout."""

    def run(self) -> None:
        """Build, or point an editable install to the sources."""
        super().run()
        if self.editable_mode:
            return
        target = Path(self.build_lib) / "pipeline" / "examples"
        target.mkdir(parents=True, exist_ok=True)
        for source in sorted(EXAMPLES.glob("*.yaml")):
            self.copy_file(str(source), str(target / source.name))


setup(cmdclass={"build_py": BuildWithExamples})
