"""Which format a folder is in."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from lightning_tinykg.data.files import KGRecFiles
from lightning_tinykg.data.kgcn import read_kgcn
from lightning_tinykg.data.reading import find_file
from lightning_tinykg.data.recbole import atomic_names, read_recbole
from lightning_tinykg.data.text import read_text, read_weighted

__all__ = ["read_folder"]

_NEEDS = """\
  KGAT/LightGCN text: train.txt and test.txt (or interactions_all.txt); kg_final.txt if there is a knowledge graph,
                      or kg.txt and item_index2entity_id.txt
  LightGCN lastfm:    data1.txt and test1.txt
  KGCN:               user_artists.dat, item_index2entity_id.txt and kg.txt
  RecBole:            NAME.inter (or NAME.train.inter and NAME.test.inter); NAME.kg and NAME.link if there is a
                      knowledge graph"""


def read_folder(root: str | Path, **options: Any) -> KGRecFiles:
    r"""Read a data set in whichever format its folder holds; every file plain, ``.xz`` or ``.gz``.

    Args:
        root: The folder.
        options: Of the format's reader: :func:`~lightning_tinykg.data.text.read_text` (``given_test``,
            ``first_raw_item``), :func:`~lightning_tinykg.data.kgcn.read_kgcn` and
            :func:`~lightning_tinykg.data.recbole.read_recbole` (``min_rating``).

    Returns:
        The data set. Its ``test`` is None where the files bring no split.

    Raises:
        FileNotFoundError: If the folder or a file is missing, or no format fits.
        ValueError: If a file is malformed; the message names file, line and what was expected.
        TypeError: If the format has no such option.

    Example:
        >>> import tempfile
        >>> folder = Path(tempfile.mkdtemp())
        >>> _ = (folder / "train.txt").write_text("0 0 1\n1 1\n"), (folder / "test.txt").write_text("0 2\n")
        >>> read_folder(folder).train.tolist()
        [[0, 0, 1], [0, 1, 1]]
    """
    root = Path(root)
    if not root.is_dir():
        raise FileNotFoundError(f"{root}: expected a folder with a data set, or 'synthetic', and found no such folder")
    return _reader(root)(root, **options)


def _reader(root: Path) -> Callable[..., KGRecFiles]:
    if atomic_names(root):
        return read_recbole
    if find_file(root, "user_artists.dat"):
        return read_kgcn
    if find_file(root, "train.txt") or find_file(root, "interactions_all.txt"):
        return read_text
    if find_file(root, "data1.txt"):
        return read_weighted
    held = ", ".join(sorted(path.name for path in root.iterdir())[:20]) or "nothing"
    raise FileNotFoundError(f"{root}: no known data set; expected one of\n{_NEEDS}\nand found {held}")
