"""Inference of a graph network in float32 and from packed codes: peak memory of the process, time, same predictions.

    python examples/benchmarks/packed_inference.py --nodes 100000 --edges 1000000 --model gat --bits 4
    python examples/benchmarks/packed_inference.py --data PATH/TO/amazon --model gcn --bits 8 4 2 2

Several widths are those of the degree buckets, lowest degrees first. Without ``--data`` the graph is made up: edges by
a power law, normal features, weights as they are initialized, so that predictions are near ties and float32's differ
from the simulation's. With it, the model is trained on Amazon-Computers first.

A first process calibrates, packs and notes the predictions of the simulation. Then each way runs in a process of its
own, which reads what a service would read: float32 features and weights, or packed ones. Memory is what is resident
above what it was before anything was read, after one forward on a tiny graph (so that libraries are loaded): when all
is read, at the peak of reading and inference together, and of that in the forward alone.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from speed_processes import Meter, trim
from torch import Tensor, nn
from torch.nn import functional as F
from torch_geometric.datasets import Amazon
from torch_geometric.nn import AGNNConv, GATConv, GCNConv, SAGEConv

from lightning_tinykg.sgquant.files import load_features, save_features
from lightning_tinykg.sgquant.granularity import topologywise, uniform
from lightning_tinykg.sgquant.model import PackedModel
from lightning_tinykg.sgquant.quantizer import SGQuantizer

MIB = 2**20
CHUNK = 10_000
WAYS = ("float32", "packed")


class Network(nn.Module):
    """Two layers of a kind; for AGNN two linear layers around them.

    Args:
        kind: ``"gcn"``, ``"gat"`` (8 heads), ``"agnn"`` or ``"sage"``.
        features: width of the input.
        hidden: width between the layers.
        classes: width of the output.
    """

    def __init__(self, kind: str, features: int, hidden: int, classes: int) -> None:
        super().__init__()
        self.kind = kind
        if kind == "gat":
            self.conv1: nn.Module = GATConv(features, hidden // 8, heads=8)
            self.conv2: nn.Module = GATConv(hidden, classes)
        elif kind == "agnn":
            self.lin1, self.lin2 = nn.Linear(features, hidden), nn.Linear(hidden, classes)
            self.conv1, self.conv2 = AGNNConv(requires_grad=False), AGNNConv()
        else:
            conv = {"gcn": GCNConv, "sage": SAGEConv}[kind]
            self.conv1, self.conv2 = conv(features, hidden), conv(hidden, classes)

    def forward(self, x: Tensor, edge_index: Tensor) -> Tensor:
        """Logits ``[N, classes]``."""
        if self.kind == "agnn":
            hidden = self.conv2(self.conv1(self.lin1(x).relu(), edge_index), edge_index)
            logits: Tensor = self.lin2(hidden)
            return logits
        out: Tensor = self.conv2(self.conv1(x, edge_index).relu(), edge_index)
        return out


def chunks(args: argparse.Namespace) -> Iterator[Tensor]:
    """The rows of the made-up features, in pieces, the same each time."""
    for first in range(0, args.nodes, CHUNK):
        generator = torch.Generator().manual_seed(args.seed + 1 + first)
        yield torch.randn(min(CHUNK, args.nodes - first), args.features, generator=generator)


def made_up_edges(args: argparse.Namespace) -> Tensor:
    """Edges ``[2, E]``; a few nodes receive most of them."""
    generator = torch.Generator().manual_seed(args.seed)
    edges = torch.empty(2, args.edges, dtype=torch.long)
    torch.randint(args.nodes, (args.edges,), generator=generator, out=edges[0])
    edges[1] = torch.rand(args.edges, generator=generator).pow_(3).mul_(args.nodes)
    return edges


def computers(folder: Path) -> tuple[Tensor, Tensor, Tensor]:
    """Features, edges and classes of Amazon-Computers; its files are copied, since PyG writes beside them."""
    with tempfile.TemporaryDirectory() as root:
        shutil.copytree(folder / "Computers" / "raw", Path(root) / "Computers" / "raw")
        data = Amazon(root, "Computers")[0]
    return data.x, data.edge_index, data.y


def train(model: nn.Module, x: Tensor, edge_index: Tensor, y: Tensor, epochs: int) -> None:
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    for _ in track(range(epochs), description="training", transient=True):
        optimizer.zero_grad()
        F.cross_entropy(model(x, edge_index), y).backward()
        optimizer.step()


def prepare(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Calibrate, pack, note what the simulation predicts, and write what the ways read."""
    torch.manual_seed(args.seed)
    if args.data:
        x, edge_index, y = computers(args.data)
        sizes = {"features": x.size(1), "classes": int(y.max()) + 1}
    else:
        x, edge_index = torch.cat(list(chunks(args))), made_up_edges(args)
        sizes = {"features": args.features, "classes": args.classes}
    model = Network(args.model, hidden=args.hidden, **sizes)
    if args.data:
        train(model, x, edge_index, y, args.epochs)
    logits = [("lin2" if args.model == "agnn" else "conv2", "update")]  # what is put out is stored by nobody
    plan = uniform(args.bits[0], logits) if len(args.bits) == 1 else topologywise(args.bits, logits)
    buckets = len(args.bits) if len(args.bits) > 1 else None
    quantizer = SGQuantizer(model.eval(), plan, buckets=buckets)
    quantizer.calibrate(lambda: model(x, edge_index))
    with quantizer, torch.no_grad():
        torch.save(model(x, edge_index).argmax(1), folder / "simulated.pt")
    packed = PackedModel.from_quantizer(quantizer, args.block_edges)
    packed.save(folder / "model")
    pieces = iter(x.split(CHUNK)) if args.data else chunks(args)
    save_features(folder / "features", packed.pack_features(pieces, edge_index, rows=x.size(0)))
    torch.save(model.state_dict(), folder / "weights.pt")
    torch.save(edge_index, folder / "edges.pt")
    x.numpy().tofile(folder / "x.bin")
    memory = quantizer.memory()
    return {
        "nodes": x.size(0),
        "edges": edge_index.size(1),
        **sizes,
        "stored_full": memory.full_bytes,
        "stored_packed": memory.packed_bytes,
    }


def load(way: str, folder: Path, args: argparse.Namespace, sizes: dict[str, Any]) -> tuple[Callable[..., Any], Tensor]:
    """The model and its features."""
    model = Network(args.model, sizes["features"], args.hidden, sizes["classes"])
    if way == "packed":
        return PackedModel.load(folder / "model", model), load_features(folder / "features")
    model.load_state_dict(torch.load(folder / "weights.pt"))
    count = sizes["nodes"] * sizes["features"]
    x = torch.empty(count)
    x.copy_(torch.from_file(str(folder / "x.bin"), size=count))
    return model.eval(), x.view(sizes["nodes"], sizes["features"])


@torch.no_grad()
def run(args: argparse.Namespace, folder: Path, way: str) -> dict[str, Any]:
    """One way: its memory, time and predictions."""
    sizes = json.loads((folder / "sizes.json").read_text())
    meter = Meter(torch.device("cpu"))
    model, features = load(way, folder, args, sizes)  # once, and on a few edges: what is loaded at the first use stays
    few = torch.zeros(2, 3, dtype=torch.long)
    model(features[:5] + 0, few) if way == "float32" else model.model(features[:5], few)
    del model, features
    gc.collect()
    trim()
    meter.peak()
    empty = meter.now()
    model, features = load(way, folder, args, sizes)
    edge_index = torch.load(folder / "edges.pt")
    gc.collect()
    trim()
    loaded, reading = meter.now(), meter.peak()
    seconds = []
    for _ in range(args.repeats):
        started = time.perf_counter()
        out = model(features, edge_index)
        seconds.append(time.perf_counter() - started)
        if len(seconds) == 1:
            forward = meter.peak()
    predicted, simulated = out.argmax(1), torch.load(folder / "simulated.pt")
    return {
        "way": way,
        "feature_bytes": features.nbytes,
        "loaded": loaded - empty,
        "peak": max(reading, forward) - empty,
        "forward_peak": forward - loaded,
        "seconds": min(seconds),
        "agreement": float((predicted == simulated).double().mean()),
    }


def table(results: list[dict[str, Any]], title: str) -> Table:
    """The ways side by side."""
    table = Table(title=title, title_justify="left")
    for column in ("", "features MiB", "loaded MiB", "peak MiB", "of the forward", "s", "agrees with the simulation"):
        table.add_column(column, justify="right" if column else "left")
    for row in results:
        sizes = (f"{row[key] / MIB:.1f}" for key in ("feature_bytes", "loaded", "peak", "forward_peak"))
        table.add_row(row["way"], *sizes, f"{row['seconds']:.2f}", f"{row['agreement']:.3%}")
    first, last = results[0], results[-1]
    ratios = (f"{first[key] / max(last[key], 1):.1f}x" for key in ("feature_bytes", "loaded", "peak", "forward_peak"))
    table.add_row("ratio", *ratios, f"{last['seconds'] / first['seconds']:.2f}x", "")
    return table


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="folder that holds Computers/raw; without it the graph is made up")
    parser.add_argument("--nodes", type=int, default=100_000)
    parser.add_argument("--edges", type=int, default=1_000_000)
    parser.add_argument("--features", type=int, default=128)
    parser.add_argument("--hidden", type=int, default=64)
    parser.add_argument("--classes", type=int, default=16)
    parser.add_argument("--model", choices=("gcn", "gat", "agnn", "sage"), default="gcn")
    parser.add_argument("--bits", type=int, nargs="+", default=[4], help="one width, or one for each degree bucket")
    parser.add_argument("--block-edges", type=int, default=1 << 14)
    parser.add_argument("--epochs", type=int, default=60, help="of training, with --data")
    parser.add_argument("--repeats", type=int, default=1, help="forwards; the fastest counts, the first one's memory")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="where to write the results")
    parser.add_argument("--child", nargs=2, metavar=("WAY", "FOLDER"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.child:
        name, shared = args.child[0], Path(args.child[1])
        print(json.dumps(prepare(args, shared) if name == "prepare" else run(args, shared, name)))
        return

    # large tensors are given back when they are freed, so that the peak is what was in use
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"}
    results = []
    with tempfile.TemporaryDirectory() as folder:
        for way in track(("prepare", *WAYS), description="processes", transient=True):
            command = [sys.executable, *sys.argv, "--child", way, folder]
            process = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=environment)
            results.append(json.loads(process.stdout.splitlines()[-1]))
            if way == "prepare":
                (Path(folder) / "sizes.json").write_text(json.dumps(results[0]))
    sizes, rows = results[0], results[1:]
    shape = f"{sizes['nodes']:,} nodes, {sizes['edges']:,} edges, {sizes['features']} features, hidden {args.hidden}"
    bits = ", ".join(map(str, args.bits))
    console = Console()
    console.width = max(console.width, 110)
    console.print(table(rows, f"Inference of {args.model} at {bits} bits: {shape}, {args.threads} thread(s)"))
    full, packed = sizes["stored_full"] / MIB, sizes["stored_packed"] / MIB
    console.print(f"stored at all places: {full:.1f} MiB in float32, {packed:.2f} MiB packed ({full / packed:.1f}x)")
    if args.json:
        arguments = {key: str(value) if isinstance(value, Path) else value for key, value in vars(args).items()}
        args.json.write_text(json.dumps({"arguments": arguments, "sizes": sizes, "results": rows}, indent=1))


if __name__ == "__main__":
    main()
