"""The engine's verbs about environments of other programs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from pipeline.console import AsJson, print_fields

env_app = typer.Typer(help="Environments of other programs, which Crosslane's own cannot hold.")


@env_app.callback()
def environments() -> None:
    """Keeps ``nvtabular`` a word of its own while it is the only one."""


@env_app.command("nvtabular")
def env_nvtabular(
    folder: Annotated[
        Path | None, typer.Argument(metavar="DIR", help="Its folder; default: in the user's application data.")
    ] = None,
    python: Annotated[
        str | None, typer.Option(metavar="PYTHON", help="Interpreter to make it with, 3.10 or 3.11.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Make the environment of `prepare criteo --engine nvtabular`, or take the one in DIR, and remember it."""
    from pipeline.etl.nvtabular_env import PINS, make_environment

    made = make_environment(folder, python)
    print_fields("Environment", {"path": str(made), "packages": list(PINS)}, as_json=as_json)
