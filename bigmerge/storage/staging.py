"""OUT.partial: where an output grows until it is complete, and what a later run finds of an earlier one.

OUT.partial/run.json     what is being made; another run description is refused
OUT.partial/lock         held while a process works here; dies with its owner
OUT.partial/output/      becomes OUT by one rename
OUT.partial/...          whatever the work needs to go on (a journal, saved sums)
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from bigmerge.errors import OutputError, ResumeError
from bigmerge.storage.manifest import MANIFEST
from bigmerge.storage.writing import output_errors, sync_path, write_json

_CHECKPOINT_FILES = (
    ".safetensors",
    ".safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
_SUFFIX = ".partial"
_AT_FDCWD = -100
_RENAME_NOREPLACE = 1
_RENAME_EXCHANGE = 2


def partial_path(out: Path) -> Path:
    """The staging directory of `out`."""
    return out.with_name(out.name + _SUFFIX)


def how_to_start_again(scratch: Path) -> str:
    """The hint on how to give up the unfinished work in `scratch`."""
    out = scratch.with_name(scratch.name.removesuffix(_SUFFIX))
    return f"`bigmerge merge --discard -o {out}` removes the unfinished work, to start again"


def check_free(out: Path, *, overwrite: bool) -> None:
    """Check that `out` may be written.

    Raises:
        OutputError: it exists and was not asked to be overwritten, or its parent is no directory.
    """
    if out.name in {"", ".."}:
        raise OutputError(f"{out}: is no name for an output directory", file=str(out))
    if os.path.lexists(out):
        if not overwrite:
            raise OutputError(
                f"{out}: exists already",
                hint="choose another output, or say --overwrite to replace it when the new one is complete",
                file=str(out),
            )
        if not out.is_dir() or out.is_symlink():
            kind = "is a link" if out.is_symlink() else "is no directory"
            raise OutputError(f"{out}: {kind}, so it is not overwritten", file=str(out))
        if not _replaceable(out):
            raise OutputError(
                f"{out}: holds no checkpoint, so it is not overwritten",
                hint="look at what is in it; if it may go, remove it yourself",
                file=str(out),
            )
    for parent in out.absolute().parents:
        if os.path.lexists(parent):
            if not parent.is_dir():
                raise OutputError(f"{parent}: is no directory", file=str(parent))
            break


def discard(out: Path) -> int:
    """Remove the unfinished work towards `out`, and nothing else; returns the bytes that it occupied.

    Raises:
        OutputError: there is none, another process works on it, or it cannot be removed.
    """
    scratch = partial_path(out)
    lock = scratch / "lock"
    if not os.path.lexists(scratch):
        raise OutputError(f"{scratch}: there is no unfinished work", file=str(scratch))
    if scratch.is_symlink() or not lock.is_file():
        raise OutputError(
            f"{scratch}: is no unfinished work of bigmerge, so it is not removed",
            hint="look at what is in it; if it may go, remove it yourself",
            file=str(scratch),
        )
    with output_errors(scratch):
        descriptor = os.open(lock, os.O_RDWR | os.O_CLOEXEC)
        try:
            _take_lock(descriptor, out)
            nbytes = sum(path.lstat().st_blocks * 512 for path in scratch.rglob("*"))
            shutil.rmtree(scratch)
        finally:
            os.close(descriptor)
    return nbytes


def _take_lock(descriptor: int, out: Path) -> None:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise OutputError(
            f"{out}: another process is writing it",
            hint="wait for it to end, or choose another output",
            file=str(out),
        ) from None


def _replaceable(out: Path) -> bool:
    """Whether a directory may be replaced: it is empty or looks like a checkpoint, not like someone's home."""
    names = [entry.name for entry in out.iterdir()]
    return not names or MANIFEST in names or any(name.endswith(_CHECKPOINT_FILES) for name in names)


class Staging:
    """The work towards `out`. Enter it to take the lock, `publish` to finish.

    Args:
        out: the directory to appear in the end.
        run: what is being made, JSON-able. Work that an earlier run left is taken up only if its description
            is the same.
        overwrite: whether an existing `out` may be replaced (at the very end, in one exchange).

    Attributes:
        scratch: OUT.partial.
        output: OUT.partial/output.
        resumed: whether an earlier run's work was found.

    Raises:
        OutputError: `out` exists, another process works on it, or the directory cannot be made.
        ResumeError: what is there belongs to another run; says what differs.
    """

    def __init__(self, out: Path, run: Mapping[str, Any], *, overwrite: bool = False) -> None:
        check_free(out, overwrite=overwrite)
        self.out = out
        self.scratch = partial_path(out)
        self.output = self.scratch / "output"
        self.resumed = False
        self._run: dict[str, Any] = json.loads(json.dumps(run))
        self._overwrite = overwrite
        self._lock: int | None = None

    def __enter__(self) -> Staging:
        try:
            self.scratch.mkdir(parents=True, exist_ok=True)
            self._lock = os.open(self.scratch / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        except OSError as error:
            raise OutputError(
                f"{error.filename or self.scratch}: cannot be made ({error.strerror})", file=str(self.scratch)
            ) from error
        try:
            with output_errors(self.scratch):
                _take_lock(self._lock, self.out)
            self._check_still_there()
            self._take_up()
        except BaseException:
            self._unlock()
            raise
        return self

    def _check_still_there(self) -> None:
        """Another process may have finished, and removed what is locked here, since this one looked."""
        assert self._lock is not None
        check_free(self.out, overwrite=self._overwrite)
        try:
            same = os.path.samestat(os.fstat(self._lock), (self.scratch / "lock").stat())
        except FileNotFoundError:
            same = False
        if not same:
            raise OutputError(
                f"{self.out}: another process has just finished work on it",
                hint="look at its result, or run the same command again",
                file=str(self.out),
            )

    def _take_up(self) -> None:
        record = self.scratch / "run.json"
        if record.exists() and self.output.is_dir():
            self._compare(record)
            self.resumed = True
            return
        # What else is here was left by a run that ended between publishing its output and removing the rest.
        self._clear()
        with output_errors(self.output):
            self.output.mkdir()
        write_json(record, self._run)

    def _compare(self, record: Path) -> None:
        try:
            earlier = json.loads(record.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError) as error:
            raise ResumeError(
                f"{record}: cannot be read ({error})",
                hint=how_to_start_again(self.scratch),
                file=str(record),
            ) from error
        differences = list(_differences(earlier, self._run))
        if differences:
            raise ResumeError(
                f"{self.scratch}: holds unfinished work of another run; what differs:\n    "
                + "\n    ".join(differences),
                hint=f"repeat the earlier command to finish it; {how_to_start_again(self.scratch)}",
                file=str(self.scratch),
                differences=differences,
            )

    def _clear(self) -> None:
        with output_errors(self.scratch):
            for path in self.scratch.iterdir():
                if path.is_dir() and not path.is_symlink():
                    shutil.rmtree(path)
                elif path.name != "lock":
                    path.unlink()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._unlock()

    def _unlock(self) -> None:
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def publish(self) -> None:
        """Make the output appear under its name, whole and durable, and remove what was only for the work.

        Raises:
            OutputError: something has appeared under that name meanwhile, or the disk refuses.
        """
        for path in sorted(self.output.rglob("*")):
            if path.is_file() or path.is_dir():
                sync_path(path)
        sync_path(self.output)
        replaces = self._overwrite and self.out.exists()
        if replaces:
            # From here on what lies in the staging directory may be the replaced output: no run may take it up.
            with output_errors(self.scratch):
                (self.scratch / "run.json").unlink()
                sync_path(self.scratch)
        code = _rename(self.output, self.out, _RENAME_EXCHANGE if replaces else _RENAME_NOREPLACE)
        if code in (errno.ENOSYS, errno.EINVAL):  # a file system without renameat2's flags
            with output_errors(self.out):
                if replaces:
                    self.out.rename(self.scratch / "replaced")
                code = 0 if not os.path.lexists(self.out) else errno.EEXIST
                if code == 0:
                    self.output.rename(self.out)
        if code:
            raise OutputError(
                f"{self.out}: the finished output cannot be given its name ({os.strerror(code)})",
                hint=f"it is complete in {self.output}",
                file=str(self.out),
            )
        sync_path(self.out.absolute().parent)
        shutil.rmtree(self.scratch, ignore_errors=True)


def _rename(source: Path, target: Path, flags: int) -> int:
    """renameat2; returns 0 or an errno."""
    libc = ctypes.CDLL(None, use_errno=True)
    if not hasattr(libc, "renameat2"):
        return errno.ENOSYS
    result = libc.renameat2(
        _AT_FDCWD, os.fsencode(source), _AT_FDCWD, os.fsencode(target), ctypes.c_uint(flags)
    )
    return 0 if result == 0 else ctypes.get_errno()


def _differences(earlier: Any, now: Any, path: str = "") -> Iterator[str]:
    if isinstance(earlier, dict) and isinstance(now, dict):
        for key in sorted({*earlier, *now}):
            yield from _differences(earlier.get(key), now.get(key), f"{path}.{key}" if path else key)
    elif isinstance(earlier, list) and isinstance(now, list) and len(earlier) == len(now):
        for position, (one, other) in enumerate(zip(earlier, now, strict=True)):
            yield from _differences(one, other, f"{path}[{position}]")
    elif earlier != now:
        before, after = (json.dumps(value, ensure_ascii=False) for value in (earlier, now))
        yield f"{path}: {before} before, {after} now"
