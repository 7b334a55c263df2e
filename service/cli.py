"""The command line ``crosslane``: one program for the engine's verbs, the service and its jobs.

This file is the entry point alone, so that it can settle signals before anything slow is imported; the verbs
are in ``service.commands``. The engine (NumPy, numba, MPI) is loaded only inside the verbs that need it.
"""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Sequence

from dlrm.errors import CrosslaneError
from pipeline import stop
from pipeline.threads import launched_ranks

INTERRUPTED = 130
"""Exit code after Ctrl-C, as shells have it."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Run one command and leave with its exit code; an error is one line on standard error."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    if next((word for word in words if not word.startswith("-")), None) == "train":
        # Before anything slow: an unhandled SIGUSR1 ends a process that is still importing.
        stop.install(single=launched_ranks() == 1)
    if "--debug" in words:  # wherever it stands
        words.remove("--debug")
        os.environ["CROSSLANE_DEBUG"] = "1"
    sys.exit(run(words))


def run(words: Sequence[str]) -> int:
    """Run one command; returns its exit code."""
    import typer

    from service.commands import app

    command = typer.main.get_command(app)
    try:
        code = command.main(args=list(words) or ["--help"], prog_name="crosslane", standalone_mode=False)
        sys.stdout.flush()
        return code if isinstance(code, int) else 0
    except typer.TyperException as error:
        return _fail(error.format_message(), error.exit_code)
    except CrosslaneError as error:
        return _fail(str(error), error.exit_code)
    except (KeyboardInterrupt, typer.Abort):
        return _fail("interrupted", INTERRUPTED)
    except BrokenPipeError:
        # The reader, such as `head`, has enough; Python must not flush into it again when it exits.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except OSError as error:
        name = f"{error.filename}: " if error.filename else ""
        return _fail(f"{name}{error.strerror or error}", 1)
    except Exception as error:  # noqa: BLE001  the last stop: no traceback for users
        return _fail(f"internal error: {type(error).__name__}: {error} (--debug shows the traceback)", 1)


def _fail(sentence: str, code: int) -> int:
    if os.environ.get("CROSSLANE_DEBUG", "") not in {"", "0"} and sys.exc_info()[0] is not None:
        traceback.print_exc()
    print(f"error: {' '.join(sentence.split())}", file=sys.stderr, flush=True)
    return code


if __name__ == "__main__":
    main()
