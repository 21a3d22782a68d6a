"""Reading lines, plain or compressed, with errors that name the file, the line and what was expected."""

import gzip
import lzma
import zlib
from pathlib import Path
from typing import NamedTuple, NoReturn

import numpy as np
import numpy.typing as npt

__all__ = ["IntLines", "Table", "fail", "find_file", "read_bytes", "read_int_lines", "read_table", "require"]

IntArray = npt.NDArray[np.int64]

SUFFIXES = ("", ".xz", ".gz")
# Ids are node numbers; a larger one is a slip, and would ask for as many nodes.
MAX_ID = 2**31 - 1

_BAD, _DIGIT, _BLANK = 0, 1, 2
_KINDS = np.zeros(256, dtype=np.uint8)
_KINDS[list(b"0123456789")] = _DIGIT
_KINDS[list(b" \t\r\n")] = _BLANK


def fail(path: Path, line: int, expected: str, got: str) -> NoReturn:
    """Raise the error that every reader raises for a malformed line.

    Args:
        path: The file.
        line: Number of the line, from 1.
        expected: What the line should have been.
        got: What it is; cut to 80 characters.

    Raises:
        ValueError: Always.

    Example:
        >>> fail(Path("train.txt"), 3, "'user item item ...'", "0 x")
        Traceback (most recent call last):
        ValueError: train.txt:3: expected 'user item item ...', got '0 x'
    """
    got = got.strip("\r\n")
    raise ValueError(f"{path}:{line}: expected {expected}, got {got[:80] + ('...' if len(got) > 80 else '')!r}")


def find_file(root: Path, name: str) -> Path | None:
    """The file, plain, ``.xz`` or ``.gz``, in this order; None if there is none.

    Args:
        root: The folder.
        name: The file's name, without the suffix of a compression.
    """
    return next((path for suffix in SUFFIXES if (path := root / (name + suffix)).is_file()), None)


def require(root: Path, name: str) -> Path:
    """The file, plain or compressed.

    Args:
        root: The folder.
        name: The file's name, without the suffix of a compression.

    Raises:
        FileNotFoundError: If there is none.
    """
    path = find_file(root, name)
    if path is None:
        raise FileNotFoundError(f"{root / name}: expected this file, plain or as .xz or .gz, and found none")
    return path


def read_bytes(path: Path) -> bytes:
    """The content of a file, unpacked if its name ends in ``.xz`` or ``.gz``.

    Args:
        path: The file.

    Raises:
        ValueError: If the compressed data are damaged.
    """
    raw = path.read_bytes()
    try:
        if path.suffix == ".xz":
            raw = lzma.decompress(raw)
        elif path.suffix == ".gz":
            raw = gzip.decompress(raw)
    except (lzma.LZMAError, zlib.error, OSError, EOFError) as error:
        raise ValueError(f"{path}: expected {path.suffix[1:]}-compressed data, got a damaged file ({error})") from error
    return raw.removeprefix(b"\xef\xbb\xbf")


class IntLines(NamedTuple):
    """A file of lines of non-negative integers.

    Attributes:
        path: The file.
        values: All integers, shape ``[N]``.
        lines: Line number of each, from 1, shape ``[N]``, ascending.
        expected: What a line should be, for errors.
    """

    path: Path
    values: IntArray
    lines: IntArray
    expected: str

    def table(self, columns: int) -> IntArray:
        """The integers as rows of a fixed number.

        Args:
            columns: Integers in a line.

        Returns:
            Shape ``[columns, rows]``.

        Raises:
            ValueError: If a line has fewer or more.
        """
        numbers, counts = np.unique(self.lines, return_counts=True)
        if (wrong := np.flatnonzero(counts != columns)).size:
            self.fail(int(numbers[wrong[0]]))
        return np.ascontiguousarray(self.values.reshape(-1, columns).T)

    def ragged(self) -> tuple[IntArray, IntArray, npt.NDArray[np.bool_]]:
        """The lines as ``key value value ...``.

        Returns:
            The key of each value, the values, and which of the integers are values.
        """
        first = np.diff(self.lines, prepend=0) != 0
        keys = self.values[first][np.cumsum(first) - 1]
        return keys[~first], self.values[~first], ~first

    def check_below(self, values: IntArray, lines: IntArray, limit: int, what: str, source: str) -> None:
        """Refuse ids that the sizes do not allow.

        Args:
            values: Ids to check.
            lines: Their lines.
            limit: Number of ids there are.
            what: What the ids are.
            source: Where the limit is from.

        Raises:
            ValueError: If an id is too large.
        """
        if (wrong := np.flatnonzero(values >= limit)).size:
            at = wrong[0]
            fail(self.path, int(lines[at]), f"{what} ids from 0 to {limit - 1} ({source})", str(values[at]))

    def fail(self, line: int) -> NoReturn:
        """Raise the error for a line that is not as expected.

        Args:
            line: Its number.

        Raises:
            ValueError: Always.
        """
        _fail_at(self.path, read_bytes(self.path), line, self.expected)


def _fail_at(path: Path, data: bytes, line: int, expected: str) -> NoReturn:
    fail(path, line, expected, data.split(b"\n")[line - 1].decode("utf-8", "replace"))


def read_int_lines(path: Path, expected: str) -> IntLines:
    """Parse lines of non-negative integers separated by blanks; blank lines are skipped.

    Args:
        path: The file.
        expected: What a line should be, for errors.

    Raises:
        ValueError: If anything else than digits and blanks is found, or an integer is too large.
    """
    data = read_bytes(path)
    chars = np.frombuffer(data, dtype=np.uint8)
    kinds = _KINDS[chars]
    newlines = np.flatnonzero(chars == ord("\n"))
    if (bad := np.flatnonzero(kinds == _BAD)).size:
        _fail_at(path, data, int(np.searchsorted(newlines, bad[0])) + 1, expected)
    edges = np.diff((kinds == _DIGIT).view(np.int8), prepend=0, append=0)
    starts, ends = np.flatnonzero(edges == 1), np.flatnonzero(edges == -1)
    lines = np.searchsorted(newlines, starts) + 1
    lengths = ends - starts
    values = np.zeros(starts.size, dtype=np.int64)
    for digit in range(min(int(lengths.max(initial=0)), 18)):
        more = digit < lengths
        values[more] = values[more] * 10 + (chars[starts[more] + digit] - ord("0"))
    if (wrong := np.flatnonzero((lengths > 18) | (values > MAX_ID))).size:
        at = wrong[0]
        fail(path, int(lines[at]), f"ids up to {MAX_ID}", data[starts[at] : ends[at]].decode())
    return IntLines(path, values, lines.astype(np.int64), expected)


class Table(NamedTuple):
    """A file of lines with a fixed number of fields.

    Attributes:
        path: The file.
        rows: The fields wanted of each line.
        lines: Line number of each row, from 1.
        expected: What a line should be, for errors.
    """

    path: Path
    rows: list[tuple[str, ...]]
    lines: list[int]
    expected: str

    def column(self, index: int) -> list[str]:
        """One field of every row.

        Args:
            index: Which of the fields wanted.
        """
        return [row[index] for row in self.rows]

    def numbers(self, index: int, dtype: type[int] | type[float]) -> npt.NDArray[np.int64] | npt.NDArray[np.float64]:
        """One field of every row as numbers.

        Args:
            index: Which of the fields wanted.
            dtype: int or float.

        Raises:
            ValueError: If a field is no number.
        """
        try:
            return np.array([dtype(row[index]) for row in self.rows])
        except (ValueError, OverflowError):
            for row, line in zip(self.rows, self.lines, strict=True):
                try:
                    dtype(row[index])
                except ValueError:
                    fail(self.path, line, self.expected, row[index])
            raise


def read_table(
    path: Path, expected: str, *, fields: int, want: tuple[int, ...], separator: str | None = "\t", skip: int = 0
) -> Table:
    """Parse lines of fields; blank lines are skipped.

    Args:
        path: The file.
        expected: What a line should be, for errors.
        fields: Number of fields in a line.
        want: Which of them to keep.
        separator: What separates fields; None: any blanks.
        skip: Number of header lines.

    Raises:
        ValueError: If a line has fewer or more fields, or is no UTF-8.
    """
    data = read_bytes(path)
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        _fail_at(path, data, data.count(b"\n", 0, error.start) + 1, f"{expected} in UTF-8")
    rows, lines = [], []
    for number, line in enumerate(text.split("\n")[skip:], start=skip + 1):
        line = line.rstrip("\r")
        if not line or line.isspace():
            continue
        parts = line.split(separator)
        if len(parts) != fields:
            fail(path, number, expected, line)
        rows.append(tuple(parts[i] for i in want))
        lines.append(number)
    return Table(path, rows, lines, expected)
