"""The input files of a job, line by line."""

import glob
import gzip
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from ..errors import ConfigError


@dataclass(frozen=True)
class InputLine:
    """One line that is not blank."""

    file: Path
    number: int  # from 1, blank lines counted
    data: bytes


def find_inputs(path: str) -> list[Path]:
    """The files that `path`, a file or a glob, names, in sorted order.

    Raises ConfigError when there are none, one cannot be read, or all are empty.
    """
    if Path(path).is_file():
        files = [Path(path)]
    else:
        files = sorted(Path(name) for name in glob.glob(path, recursive=True) if Path(name).is_file())
    if not files:
        reason = "matches no file" if glob.has_magic(path) else "does not exist or is not a file"
        raise ConfigError(f"input.path={path} {reason}")
    # Every file is opened now, so that an unreadable one cannot end the job in the middle.
    empty = [next(read_lines([file]), None) is None for file in files]
    if all(empty):
        raise ConfigError(f"input.path={path} is empty: it must hold one JSON object a line")
    return files


def read_lines(files: list[Path]) -> Iterator[InputLine]:
    """The lines of `files`, one in memory at a time. Raises ConfigError when a file cannot be read."""
    for file in files:
        number = 0
        try:
            with _open(file) as stream:
                for number, data in enumerate(stream, start=1):
                    if number == 1:
                        data = data.removeprefix(b"\xef\xbb\xbf")  # a byte order mark
                    if data.strip():
                        yield InputLine(file, number, data)
        except (OSError, EOFError, zlib.error) as error:
            where = f" after line {number}" if number else ""
            reason = getattr(error, "strerror", None) or str(error)
            raise ConfigError(f"cannot read the input file {file}{where}: {reason}") from None


def _open(file: Path) -> BinaryIO | gzip.GzipFile:
    return gzip.open(file, "rb") if file.suffix == ".gz" else open(file, "rb")
