"""A folder that appears whole or not at all."""

from __future__ import annotations

import os
import secrets
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

__all__ = ["replaceable", "replacing"]


def replaceable(target: Path, is_ours: Callable[[Path], bool]) -> bool:
    """Whether a folder may be written here: there is none, an empty one, or one of ours."""
    if not target.exists():
        return True
    return target.is_dir() and (is_ours(target) or not any(target.iterdir()))


@contextmanager
def replacing(target: Path) -> Iterator[Path]:
    """A folder to write into, which takes the target's name at the end, and is removed if something fails.

    A folder can't be exchanged for another in one step everywhere: for an instant there is none. There is never half
    of one; what was there before goes once the new one is in its place, and comes back if that fails.

    Args:
        target: the name, absolute.

    Yields:
        An empty folder beside it.

    Example:
        >>> from tempfile import TemporaryDirectory
        >>> with TemporaryDirectory() as here:
        ...     target = Path(here, "out")
        ...     with replacing(target) as partial:
        ...         _ = (partial / "part").write_text("whole")
        ...         target.exists()
        ...     [path.name for path in Path(here).iterdir()]
        False
        ['out']
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f".{target.name}.{secrets.token_hex(4)}.partial")
    partial.mkdir()
    try:
        yield partial
        for path in [*partial.iterdir(), partial]:
            _flush(path)
        old = target.with_name(f".{target.name}.{secrets.token_hex(4)}.old")
        if target.exists():
            target.rename(old)
        try:
            partial.rename(target)
        except OSError:
            if old.exists():
                old.rename(target)
            raise
        shutil.rmtree(old, ignore_errors=True)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _flush(path: Path) -> None:
    """See to it that a crash of the machine leaves no name without its bytes."""
    if os.name == "posix":
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
