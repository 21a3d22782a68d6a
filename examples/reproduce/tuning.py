"""How good can the uncompressed models be? A random search of the same size for each, judged on the validation set.

    python examples/reproduce/tuning.py --data PATH/TO/DATA --models kgat lightgcn bprmf --trials 18

Trial 0 has the settings that had been chosen by hand (`BY_HAND`), each other one draws its own from `SPACES`; all else
is as in the model's config in `examples/configs`. All trials have seed 0 and are never tested: what a table tests is
the config, at every width, since the widths are not tuned for themselves. A finished trial is a line of
`OUT/tuning.jsonl` and is not repeated; an interrupted call can simply be made again.
`examples/reproduce/tinykg.py --render` shows the table.
"""

from __future__ import annotations

import argparse
import random
from pathlib import Path
from typing import Any

from reporting import silence
from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from tinykg import RESULTS
from tinykg_runs import Case, Runner
from tinykg_tables import is_kept, keep, read, tuning_table

Space = dict[str, tuple[float, float] | list[Any]]

_OF_ALL: Space = {"lr": (1e-3, 2e-2), "l2": (1e-4, 1e-1)}

SPACES: dict[str, Space] = {
    "kgat": _OF_ALL | {"dropout": [0.0, 0.1, 0.2, 0.4], "layer_dims": [[64], [64, 32], [64, 32, 16]]},
    "lightgcn": _OF_ALL | {"num_layers": [1, 2, 3, 4]},
    "bprmf": _OF_ALL,
}
"""By model: the ends of what is drawn by its logarithm, or the choices."""

BY_HAND: dict[str, dict[str, dict[str, Any]]] = {
    "music": {
        "kgat": {"lr": 0.005, "l2": 0.03, "dropout": 0.1, "layer_dims": [64, 32, 16]},
        "lightgcn": {"lr": 0.005, "l2": 0.0001, "num_layers": 3},
        "bprmf": {"lr": 0.005, "l2": 0.03},
    }
}
BY_HAND["ml-1m"] = BY_HAND["music"] | {
    "kgat": {"lr": 0.005, "l2": 0.017, "dropout": 0.4, "layer_dims": [64, 32]},
}
"""By data set; what is not there has those of `music`."""


def drawn(model: str, trial: int, data: str = "music") -> dict[str, Any]:
    """The settings of a trial.

    Example:
        >>> drawn("bprmf", 0)
        {'lr': 0.005, 'l2': 0.03}
        >>> sorted(drawn("lightgcn", 1)) == ["l2", "lr", "num_layers"], drawn("kgat", 2) == drawn("kgat", 2)
        (True, True)
    """
    if trial == 0:
        return BY_HAND.get(data, BY_HAND["music"])[model]
    draw = random.Random(f"{model} {trial}")

    def one(choices: tuple[float, float] | list[Any]) -> Any:
        if isinstance(choices, list):
            return draw.choice(choices)
        low, high = choices
        return float(f"{low * (high / low) ** draw.random():.2g}")

    return {name: one(choices) for name, choices in SPACES[model].items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder that holds the data sets' folders")
    parser.add_argument("--models", nargs="+", choices=list(SPACES), default=list(SPACES))
    parser.add_argument("--set", default="music", help="music, ml-1m, last-fm, or synthetic:SIZE")
    parser.add_argument("--trials", type=int, default=18, help="for each model, the one by hand among them")
    parser.add_argument("--epochs", type=int, help="at most, instead of the config's")
    parser.add_argument("--patience", type=int, default=20, help="validations without a better score")
    parser.add_argument("--out", type=Path, default=RESULTS, help="where the results are kept")
    parser.add_argument("--accelerator", default="cpu")
    args = parser.parse_args()

    silence()
    args.out.mkdir(parents=True, exist_ok=True)
    path, console = args.out / "tuning.jsonl", Console()
    columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    with Progress(*columns, console=console) as progress:
        runner = Runner(args.data, args.out, progress, args.accelerator)
        for trial, model in ((trial, model) for trial in range(args.trials) for model in args.models):
            case = Case(model, args.set)
            settings = case.settings("none", args.epochs, args.patience)
            name, options = settings["model"]
            tuned = drawn(model, trial, args.set)
            settings["model"] = [name, options | tuned]
            key = {"model": model, "set": args.set, "trial": trial}
            if not is_kept(path, key, settings, f"trial {trial} of {model}"):
                result = runner.run(case, "none", 0, settings, tests=False)
                keep(path, key | {"tuned": tuned} | result | {"settings": settings})
    console.print(tuning_table(read(path)), markup=False, soft_wrap=True)


if __name__ == "__main__":
    main()
