"""Stopping between two batches, where the sums are whole, rather than anywhere."""

from __future__ import annotations

import os
import signal
import threading
from types import FrameType, TracebackType
from typing import Any


class StopRequest:
    """Within the block Ctrl-C, SIGTERM and SIGHUP only set `asked`; a second Ctrl-C interrupts at once.

    A launched process also stops when its launcher has died, which cannot tell it any more.

    Args:
        parent: id of the launcher; None: there is none to watch.

    Attributes:
        asked: whether to stop at the next good moment.
    """

    def __init__(self, *, parent: int | None = None) -> None:
        self._asked = False
        self._parent = parent
        self._previous: dict[int, Any] = {}

    @property
    def asked(self) -> bool:
        return self._asked or (self._parent is not None and os.getppid() != self._parent)

    def __enter__(self) -> StopRequest:
        # Python lets only the main thread handle signals; in another, the program at large decides.
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
                if signal.getsignal(number) is not signal.SIG_IGN:  # as under nohup
                    self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler if handler is not None else signal.SIG_DFL)
        self._previous.clear()

    def _handle(self, number: int, frame: FrameType | None) -> None:
        del frame
        if self._asked and number == signal.SIGINT:
            raise KeyboardInterrupt
        self._asked = True
