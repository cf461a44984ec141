"""What the command line writes: results to standard output, logs and errors to standard error."""

from __future__ import annotations

import json
import logging
import signal
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from types import FrameType
from typing import Any

from bigmerge.errors import BigmergeError, Interrupted


def emit(result: Mapping[str, Any], text: str, *, as_json: bool) -> None:
    """Print a command's result: `result` as one JSON object, or `text` for people."""
    if as_json:
        text = json.dumps(result, indent=2, ensure_ascii=False)
        if _printable(text) != text:
            text = json.dumps(result, indent=2)
    sys.stdout.write(_printable(text if text.endswith("\n") else text + "\n"))
    sys.stdout.flush()


def _printable(text: str) -> str:
    """`text` with what standard output's encoding does not know (λ in latin-1) as backslash escapes."""
    encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
    return text.encode(encoding, "backslashreplace").decode(encoding)


def report_error(error: BigmergeError, *, as_json: bool) -> None:
    """Print `error` on standard error, and with `as_json` as an object on standard output."""
    if as_json:
        emit(error.as_json(), "", as_json=True)
    sys.stderr.write(f"bigmerge: error: {error}\n")


def set_up_logging(*, quiet: bool = False) -> None:
    """Send bigmerge's log to standard error; `quiet` leaves only warnings."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("bigmerge: %(message)s"))
    logger = logging.getLogger("bigmerge")
    logger.handlers[:] = [handler]
    logger.setLevel(logging.WARNING if quiet else logging.INFO)
    logger.propagate = False


@contextmanager
def interruptible() -> Iterator[None]:
    """Within the block Ctrl-C is an error like others; typer would end the process in its own way.

    Raises:
        Interrupted: for every KeyboardInterrupt.
    """
    try:
        yield
    except KeyboardInterrupt:
        raise Interrupted("interrupted", hint="run the same command again to go on") from None


@contextmanager
def sigterm_as_interrupt() -> Iterator[None]:
    """Within the block SIGTERM interrupts as Ctrl-C does, so that both leave a resumable state."""

    def interrupt(signum: int, frame: FrameType | None) -> None:
        del signum, frame
        raise KeyboardInterrupt

    previous = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous if previous is not None else signal.SIG_DFL)
