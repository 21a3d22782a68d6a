"""What ``lightning-tinykg`` and ``python -m lightning_tinykg`` run."""

from __future__ import annotations

import sys


def main(args: list[str] | None = None) -> None:
    """Recommend from an exported index, which needs no torch, or go on to :mod:`lightning_tinykg.cli`.

    Args:
        args: the command line; None: that of the process.
    """
    given = sys.argv[1:] if args is None else args
    if given[:1] == ["recommend"]:
        from lightning_tinykg.hqgnn.commands import recommend

        recommend(given[1:])
    else:
        from lightning_tinykg.cli import main as run

        run(args)


if __name__ == "__main__":
    main()
