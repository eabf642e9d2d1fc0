"""The output file: appended to as rows finish, and the journal that a restart reads.

One write a finished row, an fsync a second and one at the end: after a crash only the last line can
be torn, and a row is finished exactly when its line is there.
"""

import errno
import fcntl
import json
import os
import stat
import threading
from collections.abc import Container, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import IO, Self

from ..config import JobConfig
from ..errors import ConfigError
from .response import LINE_START
from .saved_config import check_same_results, save_config

SYNC_INTERVAL_S = 1.0
CONFIG_SUFFIX = ".config.yaml"


@dataclass
class _Scan:
    """What an output file holds."""

    done: set[str] = field(default_factory=set)
    num_failed: int = 0  # of the done ones that were asked for
    redo: set[int] = field(default_factory=set)  # line numbers of the failed rows that run again
    size_bytes: int = 0  # of the whole lines; what follows is a torn one


class OutputFile:
    """Open for appending by this process alone; use as a context manager.

    done: ids of the rows that are finished and stay so; num_failed counts the input errors of `row_ids` among them.
    """

    def __init__(self, path: Path, fd: int, scan: _Scan) -> None:
        self.path = path
        self.done = scan.done
        self.num_failed = scan.num_failed
        self._fd = fd
        self._dirty = threading.Event()
        self._closing = threading.Event()
        self._sync_error: OSError | None = None
        self._syncer = threading.Thread(target=self._sync_every_second, name="output-sync", daemon=True)
        self._syncer.start()

    @classmethod
    def open(
        cls,
        path: Path,
        config: JobConfig,
        retry_failed: bool = False,
        row_ids: Container[str] | None = None,
    ) -> Self:
        """Lock and repair `path` and find out what is done; rows that run again lose their lines.

        `row_ids` are the rows of this run; None: all. The lines of others stay.

        Raises ConfigError, with the file unchanged, when it cannot be written, another run is writing it,
        it holds something else, or it was begun with settings that give other results than `config`.
        """
        path = path.resolve()  # a link stays one when the file is written anew
        fd = _open_locked(path)
        try:
            scan = _scan(path, retry_failed, row_ids)
            if scan.done:
                check_same_results(path, _config_path(path), config)
            os.ftruncate(fd, scan.size_bytes)
            if scan.redo:
                fd = _drop_lines(path, fd, scan.redo)
        except OSError as error:
            os.close(fd)
            raise ConfigError(f"cannot repair {path}: {error.strerror}") from None
        except BaseException:
            os.close(fd)
            raise
        return cls(path, fd, scan)

    def save_config(self, config: JobConfig) -> None:
        """Write the resolved config beside the output. Raises ConfigError when results would differ."""
        if self.done:
            check_same_results(self.path, _config_path(self.path), config)
        save_config(_config_path(self.path), config)

    def write(self, line: bytes) -> None:
        """Append one line, in one write. Raises ConfigError when the disk is full or gone."""
        assert line.endswith(b"\n"), "a line without its end would look torn"
        try:
            if self._sync_error is not None:
                raise self._sync_error
            written = os.write(self._fd, line)
            if written < len(line):  # the disk is full: take the half line back
                os.ftruncate(self._fd, os.fstat(self._fd).st_size - written)
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError as error:
            raise ConfigError(
                f"cannot write to {self.path}: {error.strerror}; what is there is whole, so the same command goes on"
            ) from None
        self._dirty.set()

    def close(self) -> None:
        """Sync and unlock; safe to call twice. Raises ConfigError when rows may not have come to the disk."""
        if self._closing.is_set():
            return
        self._closing.set()
        self._syncer.join()
        try:
            os.fsync(self._fd)
            # Linux tells a failed write-back once: after the syncer was told, the sync above succeeds.
            if self._sync_error is not None:
                raise self._sync_error
        except OSError as error:
            raise ConfigError(
                f"cannot sync {self.path} to its disk: {error.strerror}; its last rows may be lost, so copy it "
                "elsewhere and look at the disk before the same command goes on"
            ) from None
        finally:
            os.close(self._fd)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _sync_every_second(self) -> None:
        while not self._closing.wait(SYNC_INTERVAL_S):
            if self._dirty.is_set():
                self._dirty.clear()
                try:
                    os.fsync(self._fd)
                except OSError as error:
                    self._sync_error = error
                    return


def _config_path(path: Path) -> Path:
    return path.with_name(path.name + CONFIG_SUFFIX)


def _open_locked(path: Path) -> int:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        while True:
            fd = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o644)
            try:
                if not stat.S_ISREG(os.fstat(fd).st_mode):
                    raise ConfigError(
                        f"output.path={path} is not a regular file, so a restart could not read it"
                    )
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if os.path.samestat(os.fstat(fd), os.stat(path)):
                    return fd
            except BlockingIOError:
                os.close(fd)
                raise ConfigError(
                    f"another run is writing {path}; wait for it, or set another output.path"
                ) from None
            except BaseException:
                os.close(fd)
                raise
            os.close(fd)  # replaced between opening and locking, by a run that dropped failed rows
    except OSError as error:
        raise ConfigError(
            f"cannot write output.path={path}: {error.strerror}; name a file in a folder that you may write to"
        ) from None


def _scan(path: Path, retry_failed: bool, row_ids: Container[str] | None) -> _Scan:
    scan = _Scan()
    with open(path, "rb") as stream:
        for number, line in enumerate(stream, start=1):
            if not line.endswith(b"\n"):
                _check_torn(path, line)
                break
            row_id, error_type = _read_line(path, number, line)
            is_wanted = row_ids is None or row_id in row_ids
            if error_type == "system_error" or (error_type is not None and retry_failed):
                if is_wanted:
                    scan.redo.add(number)
            else:
                scan.done.add(row_id)
                scan.num_failed += error_type is not None and is_wanted
            scan.size_bytes += len(line)
    return scan


def _read_line(path: Path, number: int, line: bytes) -> tuple[str, str | None]:
    """A finished row's id, and the type of its error if it has one."""
    try:
        values = json.loads(line)
        row_id, error = values["custom_id"], values["error"]
        if isinstance(row_id, str) and isinstance(values["response"], dict | None):
            return row_id, None if error is None else str(error["type"])
    except (ValueError, KeyError, TypeError):
        pass
    raise ConfigError(
        f"{path} line {number} is no output line of a batch job, so it is not known which rows are done; "
        "mend or delete that line, or set another output.path"
    )


def _check_torn(path: Path, tail: bytes) -> None:
    # After a power cut a file system may show zeros where the last write was to be.
    tail = tail.rstrip(b"\0")
    if not (tail.startswith(LINE_START) or LINE_START.startswith(tail)):
        raise ConfigError(f"{path} was not written by a batch job; set another output.path")


def _drop_lines(path: Path, fd: int, numbers: set[int]) -> int:
    """Replace the file by one without these lines, atomically; returns the new, locked descriptor."""
    temporary = path.with_name(path.name + ".rewrite")
    new_fd = os.open(temporary, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_TRUNC, 0o644)
    try:
        os.fchmod(new_fd, stat.S_IMODE(os.fstat(fd).st_mode))
        fcntl.flock(new_fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        with open(path, "rb") as old, open(new_fd, "wb", closefd=False) as new:
            _copy(old, new, numbers)
        os.fsync(new_fd)
        os.replace(temporary, path)
        _sync_folder(path.parent)
    except BaseException:
        os.close(new_fd)
        with suppress(FileNotFoundError):
            temporary.unlink()
        raise
    os.close(fd)
    return new_fd


def _copy(old: IO[bytes], new: IO[bytes], without: set[int]) -> None:
    kept: Iterator[bytes] = (line for number, line in enumerate(old, start=1) if number not in without)
    new.writelines(kept)


def _sync_folder(folder: Path) -> None:
    fd = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
