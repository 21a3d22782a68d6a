"""Parsed files, kept: one ``.npz`` per data set, re-made whenever anything about it is in doubt."""

import hashlib
import json
import os
import tempfile
import warnings
import zipfile
import zlib
from pathlib import Path
from typing import Any, Literal

import numpy as np

from lightning_tinykg.data.files import KGRecFiles
from lightning_tinykg.data.formats import read_folder

__all__ = ["READER_VERSION", "default_cache_dir", "read_cached"]

# To be raised by whoever changes what a reader returns: caches of before are then not used.
READER_VERSION = 1


def default_cache_dir() -> Path:
    """``lightning_tinykg`` in the user's cache folder (``XDG_CACHE_HOME``, else ``~/.cache``)."""
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "lightning_tinykg"


def read_cached(root: Path, cache_dir: str | Path | Literal[False] | None = None, **options: Any) -> KGRecFiles:
    """Read a folder, from the cache if it has it.

    The cache is keyed by the folder, the names, sizes and times of its files, the options and the readers' version.
    A damaged cache file is re-made; one that cannot be written is a warning.

    Args:
        root: The folder.
        cache_dir: Where to keep what was parsed; None: :func:`default_cache_dir`; False: nowhere.
        options: See :func:`~lightning_tinykg.data.read_folder`.

    Raises:
        FileNotFoundError: If the folder or a file is missing.
        ValueError: If a file is malformed.
    """
    if cache_dir is False or not root.is_dir():
        return read_folder(root, **options)
    key = _key(root, options)
    path = (default_cache_dir() if cache_dir is None else Path(cache_dir)) / f"{root.resolve().name}-{key[:16]}.npz"
    if (files := _load(path, key)) is not None:
        return files
    files = read_folder(root, **options)
    try:
        _save(path, key, files)
    except OSError as error:
        warnings.warn(f"could not keep the parsed files of {root} in {path.parent}: {error}", stacklevel=2)
    return files


def _key(root: Path, options: dict[str, Any]) -> str:
    entries = sorted((p.name, s.st_size, s.st_mtime_ns) for p in root.iterdir() if p.is_file() and (s := p.stat()))
    text = json.dumps([READER_VERSION, str(root.resolve()), entries, options], sort_keys=True, default=repr)
    return hashlib.sha256(text.encode()).hexdigest()


def _load(path: Path, key: str) -> KGRecFiles | None:
    try:
        with np.load(path, allow_pickle=False) as stored:
            arrays = {name: stored[name] for name in stored.files}
        if str(arrays.pop("key", "")) != key:
            return None
        return KGRecFiles.from_arrays(arrays)
    except FileNotFoundError:
        return None
    # Whatever a damaged file makes numpy, zipfile or the checks raise: it is not trusted.
    except (OSError, ValueError, TypeError, KeyError, EOFError, zipfile.BadZipFile, zlib.error, NotImplementedError):
        return None


def _save(path: Path, key: str, files: KGRecFiles) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    # Written aside and renamed: another process sees the whole file or none.
    handle, temporary = tempfile.mkstemp(dir=path.parent, suffix=".part")
    try:
        with os.fdopen(handle, "wb") as file:
            np.savez(file, **{**files.arrays(), "key": np.array(key)})  # type: ignore[arg-type]  # numpy types savez for one array
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
