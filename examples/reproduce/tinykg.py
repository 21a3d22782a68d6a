"""TinyKG's table: what do a few bits cost, and what do they save? KGAT, KGCN and KGNN-LS on real data.

    python examples/reproduce/tinykg.py --data PATH/TO/DATA --models kgcn-ctr --sets music --seeds 0 1 2 3 4
    python examples/reproduce/tinykg.py --data PATH/TO/DATA --models kgat --sets music --ways none 2 --out runs/kgat
    python examples/reproduce/tinykg.py --render

`--data` is the folder that holds the data sets' folders. The hyper-parameters are those of `examples/configs`
(`MODEL-SET.yaml`, else `MODEL-music.yaml`, which is then not tuned for the data set), the same for all ways. Every run
is kept in the epoch that was best on the validation set, and tested once. The split is the same for all runs; the seed
decides the initialisation, dropout and the noise of the rounding.

A finished run is a line of `OUT/MODEL-SET.jsonl` and is not repeated: an interrupted call can simply be made again, and
goes on with the last whole epoch of the run that it was in. `--render` writes `docs/results.md` and its plots from the
kept lines alone, and trains nothing.
"""

import argparse
from pathlib import Path
from typing import Any

from reporting import silence
from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from tinykg_runs import CONFIGS, Case, Runner
from tinykg_tables import is_kept, keep, read, render, table
from tinykg_ways import WAYS
from tinykg_ways import settings as way_settings

RESULTS = Path(__file__).parent / "results"
DOCS = Path(__file__).parents[2] / "docs"
MODELS = ["popularity", *sorted(path.stem.removesuffix("-music") for path in CONFIGS.glob("*-music.yaml"))]

BASELINES = ("popularity", "lightgcn", "bprmf")
"""Models without the knowledge graph, which are trained uncompressed only."""


def way(text: str) -> str:
    """A value of ``--ways`` that can be used."""
    try:
        way_settings(text, epochs=1)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    return text


def wanted(args: argparse.Namespace) -> list[tuple[Case, str, int]]:
    """All runs that are asked for, seed by seed: a table that is interrupted has as many seeds for each way.

    The most popular items have neither bits nor seeds; LightGCN and BPR-MF keep too little to compress.
    """
    runs: list[tuple[Case, str, int]] = []
    for name in args.sets:
        for model in args.models:
            ways = ["none"] if model in BASELINES else args.ways
            seeds = [0] if model == "popularity" else args.seeds
            runs += [(Case(model, name), way, seed) for seed in seeds for way in ways]
    return runs


def wandb_logger(case: Case, way: str, seed: int, settings: dict[str, Any], project: str, folder: Path) -> Any:
    """A logger of one run, in a group with the other seeds; ``WANDB_MODE=offline`` needs no account."""
    from lightning.pytorch.loggers import WandbLogger

    group = f"{case.model}/{case.set}/{way}"
    config = {"model": case.model, "set": case.set, "way": way, "seed": seed, "settings": settings}
    return WandbLogger(project=project, group=group, name=f"{group}/{seed}", config=config, save_dir=folder)


def run_all(args: argparse.Namespace, console: Console) -> None:
    """Make the runs that are not there yet."""
    args.out.mkdir(parents=True, exist_ok=True)
    columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    with Progress(*columns, console=console) as progress:
        runner = Runner(args.data, args.out, progress, args.accelerator)
        for case, way, seed in wanted(args):
            path = args.out / case.file
            key = {"model": case.model, "set": case.set, "way": way, "seed": seed}
            settings = case.settings(way, args.epochs, args.patience)
            if not is_kept(path, key, settings, f"{way}, seed {seed}"):
                logger: Any = wandb_logger(case, way, seed, settings, args.wandb, args.out) if args.wandb else False
                row = key | runner.run(case, way, seed, settings, logger) | {"settings": settings}
                keep(path, row)
                if args.wandb:
                    logger.experiment.finish()
            progress.console.print(f"{path.name}: {way}, seed {seed}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="folder that holds the data sets' folders")
    parser.add_argument("--models", nargs="+", choices=MODELS, default=["kgat", "kgcn", "kgcn-ctr", "kgnnls"])
    parser.add_argument("--sets", nargs="+", default=["music"], help="music, ml-1m, last-fm, or synthetic:SIZE")
    parser.add_argument("--ways", nargs="+", type=way, default=list(WAYS), help="to keep activations")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2, 3, 4])
    parser.add_argument("--epochs", type=int, help="at most, instead of the config's")
    parser.add_argument("--patience", type=int, help="validations without a better score, instead of the config's")
    parser.add_argument("--out", type=Path, default=RESULTS, help="where the results are kept")
    parser.add_argument("--accelerator", default="cpu")
    parser.add_argument("--wandb", nargs="?", const="lightning-tinykg", metavar="PROJECT", help="log each run there")
    parser.add_argument("--render", action="store_true", help="write docs/results.md from what is kept")
    parser.add_argument("--docs", type=Path, default=DOCS, help="where --render writes")
    args = parser.parse_args()
    if args.data is None and not args.render and not all(name.startswith("synthetic") for name in args.sets):
        parser.error("--data is needed: the folder that holds the data sets' folders")

    silence()
    console = Console()
    if args.render:
        for path in render(args.out, args.docs):
            console.print(f"wrote {path}")
        return
    args.data = args.data or Path()
    run_all(args, console)
    for case in dict.fromkeys(case for case, _, _ in wanted(args)):
        console.print(table(read(args.out / case.file)), markup=False, soft_wrap=True)


if __name__ == "__main__":
    main()
