"""One process of an estimate that `bigmerge.fisher.launching` started: `python -m bigmerge.fisher.worker DIR`."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import sys
from pathlib import Path

from bigmerge.cli.console import set_up_logging, sigterm_as_interrupt
from bigmerge.errors import BigmergeError, Interrupted
from bigmerge.fisher.launching import RESULT_FILE, SETTINGS_FILE
from bigmerge.fisher.run import run
from bigmerge.fisher.settings import FisherSettings
from bigmerge.processes import joined_rank, write_error

logger = logging.getLogger("bigmerge.fisher")


def main(directory: Path) -> int:
    """Run the settings in `directory`, leave the result or the error there, and return the exit code."""
    parent = os.getppid()
    rank = joined_rank()
    settings = FisherSettings.from_json(json.loads((directory / SETTINGS_FILE).read_text(encoding="utf-8")))
    set_up_logging(quiet=rank != 0 or not settings.progress)
    error_file = directory / f"rank-{rank}.error"
    try:
        with sigterm_as_interrupt():
            result = run(settings, parent=parent)
    except BigmergeError as error:
        write_error(error_file, error)
        return error.exit_code
    except KeyboardInterrupt:
        return Interrupted.exit_code
    except Exception as error:
        write_error(error_file, error)
        with contextlib.suppress(FileExistsError):
            # A mistake of ours: one traceback, whichever process met it first.
            (directory / "traceback").touch(exist_ok=False)
            logger.exception("process %d failed", rank)
        return BigmergeError.exit_code
    if rank == 0:
        (directory / RESULT_FILE).write_text(json.dumps(result), encoding="utf-8")
    return 0


if __name__ == "__main__":
    code = main(Path(sys.argv[1]))
    sys.stdout.flush()
    sys.stderr.flush()
    # Not through the interpreter's end, which aborts if a thread of the process group is still letting go of
    # an exchange that an error has cut short.
    os._exit(code)
