"""Takes each protection out, one at a time, and shows that a test fails then: ``make protections``.

    python tests/conformance/protections.py
    python tests/conformance/protections.py --only version leak

A protection is a piece of the package's source. It is taken out in a copy, in which its test has to fail; in the
project as it is, the same tests pass (``make test``). What is listed is in ``protections.json``: what is protected, the
file, the source and what stands in its place, the test.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.progress import track
from rich.table import Table

ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Protection:
    """A piece of source, and the test that misses it.

    Attributes:
        protects: what it protects.
        file: its file, from the project's root.
        old: the source.
        new: what stands in its place when it is taken out.
        test: id of a test that fails then.
    """

    protects: str
    file: str
    old: str
    new: str
    test: str

    def fails_without(self) -> bool:
        """Whether the test fails where the protection is taken out: by a failure, not for want of a test."""
        with tempfile.TemporaryDirectory() as folder:
            copy = Path(folder)
            for name in ("lightning_tinykg", "tests", "examples"):
                shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
            shutil.copy(ROOT / "pyproject.toml", copy)
            source = (copy / self.file).read_text()
            assert source.count(self.old) == 1
            (copy / self.file).write_text(source.replace(self.old, self.new))
            command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:xdist", self.test]
            ended = subprocess.run(command, cwd=copy, env=os.environ | {"PYTHONPATH": folder}, capture_output=True)
            return ended.returncode == 1 or ended.returncode < 0  # or it crashed


def protections() -> list[Protection]:
    """All that are listed."""
    listed = json.loads((Path(__file__).parent / "protections.json").read_text())
    return [Protection(**item) for item in listed]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", help="words: those that protect against something with one of them")
    parser.add_argument("--workers", type=int, default=2, help="at a time")
    options = parser.parse_args()
    listed = [p for p in protections() if not options.only or any(word in p.protects for word in options.only)]
    unknown = [p.protects for p in listed if (ROOT / p.file).read_text().count(p.old) != 1]
    if unknown:  # told before the rest is run for half an hour
        raise SystemExit(f"the list is out of step with the source: {'; '.join(unknown)}")
    with ThreadPoolExecutor(options.workers) as pool:
        failed = list(track(pool.map(Protection.fails_without, listed), "taken out", total=len(listed)))
    table = Table("taken out", "test", "then")
    for protection, fails in zip(listed, failed, strict=True):
        table.add_row(protection.protects, protection.test, "fails" if fails else "[red]DOES NOT FAIL[/red]")
    Console(width=160).print(table)
    print(f"{sum(failed)} of {len(listed)} protections are missed by their test when taken out")
    return 0 if all(failed) else 1


if __name__ == "__main__":
    sys.exit(main())
