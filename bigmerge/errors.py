"""What can go wrong, as one tree. Each kind has its own exit code, so that scripts can tell them apart.

    BigmergeError                 1   anything below, or an unexpected condition named by bigmerge
    ├─ UsageError                 2   the arguments contradict each other or cannot mean anything
    ├─ InputError                 3   something that was given as input is not usable
    │  ├─ CheckpointError             a weight file or index is malformed, truncated or unsupported
    │  ├─ AlignmentError              models and Fishers do not fit together; lists every problem at once
    │  └─ DatasetError                a data set, a column or an example is not usable
    ├─ OutputError                4   the output cannot be written where it was asked for
    ├─ ResourceError              5   the run cannot keep its memory budget or does not fit on the disk
    ├─ ResumeError                6   what an earlier run left behind does not belong to this one
    ├─ VerificationError          7   stored bytes are not what the manifest says
    ├─ EstimationError            8   a Fisher estimate failed its self-check or met non-finite gradients
    └─ Interrupted              130   stopped by Ctrl-C or SIGTERM; the same command goes on

The text of an error is made once, where it is raised; `hint` says what to do next; every fact in the text
is also an attribute of `data`, for programs.
"""

from __future__ import annotations

from typing import Any, ClassVar


class BigmergeError(Exception):
    """Base of all errors that bigmerge raises on purpose."""

    exit_code: ClassVar[int] = 1
    #: whether another process of the same job reports this error already
    reported: bool = False

    def __init__(self, message: str, *, hint: str | None = None, **data: Any) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint
        self.data = data

    def __str__(self) -> str:
        return f"{self.message}\n  hint: {self.hint}" if self.hint else self.message

    def as_json(self) -> dict[str, Any]:
        """What `--json` prints for this error."""
        return {
            "error": type(self).__name__,
            "message": self.message,
            "hint": self.hint,
            "data": {key: _plain(value) for key, value in self.data.items()},
        }


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple, set)):
        return [_plain(item) for item in value]
    return value if isinstance(value, (str, int, float, bool, type(None))) else str(value)


class UsageError(BigmergeError):
    exit_code = 2


class InputError(BigmergeError):
    exit_code = 3


class CheckpointError(InputError):
    pass


class AlignmentError(InputError):
    pass


class DatasetError(InputError):
    pass


class OutputError(BigmergeError):
    exit_code = 4


class ResourceError(BigmergeError):
    exit_code = 5


class ResumeError(BigmergeError):
    exit_code = 6


class VerificationError(BigmergeError):
    exit_code = 7


class EstimationError(BigmergeError):
    exit_code = 8


class Interrupted(BigmergeError):
    exit_code = 130
