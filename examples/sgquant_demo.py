"""A recommender whose embeddings, messages and attention are stored in few bits, on the built-in synthetic graph.

    python examples/sgquant_demo.py
    python examples/sgquant_demo.py --model kgat --bits 8 4 --tuning-epochs 3

A full-precision model is trained once. SGQuant then quantizes what it stores of nodes and edges: one width everywhere,
widths by the degree of the node, and a plan that automatic bit selection found, the smallest it measured whose
validation Recall@20 is within half a per cent of full precision's (the nearest to it if none is). Each is tested as it
is, and fine-tuned with one callback in the Trainer; fine-tuning keeps the epoch that was best on the validation set,
and what it started from if none was better. At last the searched plan's model is really packed, saved, loaded, and
asked for recommendations. Prints a table and draws recall against bytes. A searched plan was chosen by its validation
score, the best of many, so believe its test score; on a graph with few users the two are far apart.
"""

import argparse
import copy
import logging
import tempfile
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from lightning_tinykg import KGAT, AutoBitSelector, BitPlan, KGRecDataModule, LightGCN, SearchSpace, SGQuantCallback
from lightning_tinykg.bits.front import NothingWithin
from lightning_tinykg.models.base import RankingModule
from lightning_tinykg.sgquant import PackedModel, topologywise, uniform

MIB = 2**20
WIDTHS = (1, 2, 3, 4, 6, 8)
BY_DEGREE = [1, 2, 4, 8]
"""Low degrees first: what is popular gets the most bits, other than in the paper, which classifies nodes."""
WATCHED: dict[str, Any] = {"monitor": "val/recall@20", "mode": "max"}


@dataclass
class Row:
    """One row of the table."""

    plan: str
    tuned: bool
    model: RankingModule = field(repr=False)
    callback: SGQuantCallback | None
    """Without one it is full precision."""
    val: float
    test: float
    bits: float = 32.0
    nbytes: int = 0


def trainer(*callbacks: Callback, **options: Any) -> L.Trainer:
    """A quiet one, on the CPU."""
    quiet: dict[str, Any] = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    quiet["callbacks"] = list(callbacks)
    return L.Trainer(accelerator="cpu", devices=1, num_sanity_val_steps=0, **quiet, **options)


def train(model: RankingModule, data: KGRecDataModule, epochs: int, *callbacks: Callback) -> float:
    """Train; leaves the model as it was in its best epoch, and returns that epoch's validation Recall@20."""
    with tempfile.TemporaryDirectory() as folder:
        best = ModelCheckpoint(folder, save_weights_only=True, **WATCHED)
        trainer(*callbacks, best, max_epochs=epochs).fit(model, data)
        model.load_state_dict(torch.load(best.best_model_path, weights_only=True)["state_dict"])
    return float(best.best_model_score or 0.0)


def validate(model: RankingModule, data: KGRecDataModule, *callbacks: Callback) -> float:
    """Validation Recall@20."""
    run = trainer(*callbacks, enable_checkpointing=False)
    return float(run.validate(model, data, verbose=False)[0]["val/recall@20"])


def test(model: RankingModule, data: KGRecDataModule, *callbacks: Callback) -> dict[str, float]:
    """Test metrics; with an `SGQuantCallback`, also what is stored."""
    return dict(trainer(*callbacks, enable_checkpointing=False).test(model, data, verbose=False)[0])


def quantized(
    name: str, plan: BitPlan, tuning_epochs: int, full: RankingModule, data: KGRecDataModule, seed: int
) -> Row:
    """A plan as it is, or fine-tuned."""
    L.seed_everything(seed, verbose=False)
    model = copy.deepcopy(full)
    callback = SGQuantCallback(plan, finetune_epochs=tuning_epochs, range="mse")
    val = validate(model, data, callback)
    if tuning_epochs:
        model.lr = 0.002
        tuned = train(model, data, tuning_epochs, callback)
        if tuned <= val:
            model.load_state_dict(full.state_dict())
        val = max(tuned, val)
    found = test(model, data, callback)
    nbytes = round(found["sgquant/packed_MiB"] * MIB)
    bits = found["sgquant/average_bits"]
    return Row(name, tuning_epochs > 0, model, callback, val, found["test/recall@20"], bits, nbytes)


def search(row: Row, reference: float, data: KGRecDataModule, args: argparse.Namespace) -> BitPlan:
    """The smallest plan within half a per cent of full precision's validation Recall@20, nothing trained."""
    assert row.callback is not None
    quantizer = row.callback.quantizer
    assert quantizer is not None
    own = quantizer.plan

    def recall(plan: BitPlan) -> float:
        quantizer.set_plan(plan)
        with quantizer:
            return validate(row.model, data)

    front = AutoBitSelector(
        SearchSpace({("*", place.component, place.topology): WIDTHS for place in quantizer.places()}),
        recall,
        lambda plan: quantizer.memory(plan).packed_bytes,
        measurements=args.measurements,
        rounds=args.rounds,
        reference=reference,
        tolerance="0.5%",
        seed=args.seed,
        progress=False,
    ).run()
    quantizer.set_plan(own)
    try:
        return front.smallest_within().plan
    except NothingWithin as nothing:
        return nothing.nearest.plan


def packed(row: Row, data: KGRecDataModule) -> str:
    """Pack, save, load, and compare all users' recommendations with the simulated model's."""
    assert row.callback is not None
    assert row.callback.quantizer is not None
    with tempfile.TemporaryDirectory() as folder:
        row.callback.pack().save(folder)
        fresh = type(row.model)(**row.model.hparams)
        fresh.set_graph(data.graph)
        loaded = PackedModel.load(folder, fresh)
        written = sum(path.stat().st_size for path in Path(folder).iterdir())
    users = range(data.num_users)
    with row.callback.quantizer:
        simulated, _ = row.model.recommend(users)
    with loaded.running() as model:
        items, _ = model.recommend(users)  # type: ignore[operator]  # a method of the model, not of nn.Module
    same = (items == simulated).all(dim=1).float().mean()
    return (
        f"Packed, saved and loaded ({written / MIB:.2f} MiB on disk, dense weights included): "
        f"the same 20 items as simulated for {same:.2%} of {data.num_users:,} users"
    )


def table(rows: list[Row], title: str) -> Table:
    """The plans side by side."""
    shown = Table(title=title, title_justify="left")
    for column in ("plan", "", "average bits", "MiB", "ratio", "validation", "test", "of float32"):
        shown.add_column(column, justify="left" if column in ("plan", "") else "right", no_wrap=True)
    full = rows[0]
    for row in rows:
        way = "as trained" if row.callback is None else "fine-tuned" if row.tuned else "post-training"
        sizes = (f"{row.bits:.2f}", f"{row.nbytes / MIB:.3f}", f"{full.nbytes / row.nbytes:.1f}x")
        shown.add_row(row.plan, way, *sizes, f"{row.val:.4f}", f"{row.test:.4f}", f"{row.test / full.test:.1%}")
    return shown


def picture(rows: list[Row], path: Path) -> None:
    """Recall against bytes: the uniform plans are a line, the others points; filled if fine-tuned."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 4.2), layout="constrained")
    axes = figure.subplots()
    full = rows[0]
    axes.axhline(full.test, color="0.5", linestyle="--", label=f"float32, {full.nbytes / MIB:.2f} MiB")
    kinds = {"uniform": "o", "by degree": "^", "searched": "*"}
    for number, (kind, marker) in enumerate(kinds.items()):
        for tuned in (False, True):
            mine = [row for row in rows[1:] if row.plan.startswith(kind) and row.tuned == tuned]
            if mine:
                mine.sort(key=lambda row: row.nbytes)
                style: dict[str, Any] = {"marker": marker, "markersize": 9, "linestyle": "-" if tuned else ":"}
                style |= {"color": f"C{number}", "markerfacecolor": f"C{number}" if tuned else "none"}
                label = f"{kind}, {'fine-tuned' if tuned else 'post-training'}"
                axes.plot([row.nbytes / MIB for row in mine], [row.test for row in mine], label=label, **style)
    axes.set_xscale("log", base=2)
    axes.set_xlabel("stored of nodes and edges, MiB (log scale)")
    axes.set_ylabel("test Recall@20")
    axes.legend()
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=150)


def main() -> None:
    """Run the demo."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="synthetic:60000", help='folder of a data set, or "synthetic:EDGES"')
    parser.add_argument("--model", default="lightgcn", choices=("lightgcn", "kgat"))
    parser.add_argument("--bits", type=int, nargs="+", default=[8, 4, 2], help="of the uniform plans")
    parser.add_argument("--epochs", type=int, default=20, help="of the full-precision model")
    parser.add_argument("--tuning-epochs", type=int, default=5, help="of each fine-tuning")
    parser.add_argument("--measurements", type=int, default=40, help="of the search, before it predicts")
    parser.add_argument("--rounds", type=int, default=4, help="of ten predicted plans each")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("sgquant.png"), help="where the picture goes")
    args = parser.parse_args()
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")

    L.seed_everything(args.seed, verbose=False)
    kgat = args.model == "kgat"
    data = KGRecDataModule(args.data, batch_size=2048, triple_batch_size="auto" if kgat else None)
    model = KGAT(lr=0.01, attention="in-graph") if kgat else LightGCN(dim=64, lr=0.005)
    plans = {f"uniform {bits}": uniform(bits) for bits in args.bits}
    plans[f"by degree {', '.join(map(str, BY_DEGREE))}"] = topologywise(BY_DEGREE)
    columns = (TextColumn("{task.description:32}"), BarColumn(), TextColumn("{task.completed}/{task.total}"))
    with Progress(*columns, TimeElapsedColumn()) as progress:
        task = progress.add_task("full precision", total=2 * len(plans) + 4)
        val = train(model, data, args.epochs)
        rows = [Row("float32", False, model, None, val, test(model, data)["test/recall@20"])]
        progress.advance(task)

        def both(name: str, plan: BitPlan) -> None:
            for epochs in (0, args.tuning_epochs):
                progress.update(task, description=f"{name}, {'fine-tuning' if epochs else 'post-training'}")
                rows.append(quantized(name, plan, epochs, model, data, args.seed))
                progress.advance(task)

        for name, plan in plans.items():
            both(name, plan)
        progress.update(task, description="automatic bit selection")
        found = search(rows[1], val, data, args)
        progress.advance(task)
        both("searched", found)
    measured = rows[1].callback
    assert measured is not None
    assert measured.quantizer is not None
    rows[0].nbytes = measured.quantizer.memory().full_bytes
    console = Console()
    console.width = max(console.width, 110)
    console.print(table(rows, f"{type(model).__name__}, {args.data} graph, SGQuant, Recall@20"))
    console.print(packed(rows[-1], data))
    picture(rows, args.out)
    console.print(f"Recall against bytes: {args.out}")


if __name__ == "__main__":
    main()
