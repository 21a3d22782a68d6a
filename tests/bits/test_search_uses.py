"""One searcher for all that has widths: SGQuant's places, TinyKG's saved tensors, HQ-GNN's two tables."""

from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor, nn

from lightning_tinykg import HQGNN, BitPlan, KGRecDataModule, LightGCN, compress_activations
from lightning_tinykg.bits.search import AutoBitSelector
from lightning_tinykg.bits.space import SearchSpace
from lightning_tinykg.sgquant import SGQuantizer

SMALL: dict[str, Any] = {"measurements": 8, "rounds": 2, "per_round": 4, "progress": False}


def smaller_than_one_width(search: AutoBitSelector) -> BitPlan:
    """The plan found, which must hold what it promises, and be smaller than any plan of one width that does."""
    front = search.run()
    found = front.smallest_within()
    assert front.reference - found.accuracy <= search.tolerance  # type: ignore[operator]  # a number here
    uniform = [search.space.plan(choice) for choice in search.space.uniform()]
    within = [t for t in front.trials if t.plan in uniform and front.reference - t.accuracy <= search.tolerance]  # type: ignore[operator]  # a number
    assert found.nbytes < min(trial.nbytes for trial in within)
    return found.plan


class Branches(nn.Module):
    """Two branches alike, of which one has a hundredth of the weight in the output."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.minor, self.major = (nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 64)) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.major(x) + 0.01 * self.minor(x)
        return out


def test_widths_of_saved_tensors_by_the_gradients_error() -> None:
    model, x, target = Branches(), torch.randn(64, 32), torch.randn(64, 64)

    def step(plan: BitPlan | int, seed: int = 0) -> tuple[Tensor, int]:
        with compress_activations(bits=plan, seed=seed, min_bytes=0, recompute="off") as ledger:
            loss = (model(x) - target).square().mean()
        grads = torch.autograd.grad(loss, list(model.parameters()))
        return torch.cat([grad.flatten() for grad in grads]), ledger.stored_bytes

    exact, most = step(32)

    def less_error(plan: BitPlan) -> float:
        errors = [(step(plan, seed)[0] - exact).norm() / exact.norm() for seed in range(4)]
        return -float(torch.stack(errors).mean())

    space = SearchSpace({"minor": (1, 2, 4, 8), "major": (1, 2, 4, 8)})
    search = AutoBitSelector(
        space, less_error, lambda plan: step(plan)[1], reference=0.0, tolerance=0.02, samples=16, **SMALL
    )
    plan = smaller_than_one_width(search)
    minor, major = (plan.bits_for(layer, "Mm.self") for layer in ("minor.2", "major.2"))
    assert minor < major  # type: ignore[operator]  # no schedules
    assert step(plan)[1] < most


QUIET: dict[str, Any] = {
    "accelerator": "cpu", "logger": False, "enable_progress_bar": False, "enable_model_summary": False,
    "enable_checkpointing": False, "num_sanity_val_steps": 0,
}  # fmt: skip


def test_widths_of_the_two_tables_of_hqgnn_by_validation() -> None:
    data = KGRecDataModule("synthetic:3000", batch_size=256, triple_batch_size=None)
    encoder = LightGCN(dim=16, num_layers=2, lr=0.01)
    L.Trainer(max_epochs=5, limit_val_batches=0, **QUIET).fit(encoder, data)
    model = HQGNN(encoder, estimator="ptq", quantize_users=True)
    quantizers = {"users": model.user_quantizer, "items": model.item_quantizer}
    shapes = {"users": (data.num_users, 16), "items": (data.num_items, 16)}

    def use(plan: BitPlan) -> None:
        for table, quantizer in quantizers.items():
            quantizer.bits = plan.bits_for(table)  # type: ignore[assignment]  # no schedules

    def recall(plan: BitPlan) -> float:
        use(plan)
        (found,) = L.Trainer(**QUIET).validate(model, data, verbose=False)
        return found["val/recall@20"]

    def bytes_of(plan: BitPlan) -> int:
        use(plan)
        return sum(quantizer.table_bytes(*shapes[table]) for table, quantizer in quantizers.items())

    space = SearchSpace(dict.fromkeys(quantizers, (1, 2, 4, 8)))
    plan = smaller_than_one_width(AutoBitSelector(space, recall, bytes_of, tolerance=0.01, **SMALL))
    use(plan)
    users, items = model.tables()
    assert (users.bits, items.bits) == (plan.bits_for("users"), plan.bits_for("items"))
    assert users.nbytes + items.nbytes == bytes_of(plan)


@pytest.mark.parametrize("granularity", ["tensor", "node"])
def test_widths_of_places_by_what_the_output_loses(granularity: Any) -> None:
    from torch_geometric.nn import GCN

    torch.manual_seed(0)
    x, edge_index = torch.randn(60, 8), torch.randint(60, (2, 240))
    model = GCN(8, 16, num_layers=2, out_channels=4).eval()
    quantizer = SGQuantizer(model, buckets=None, granularity=granularity)
    quantizer.calibrate(lambda: model(x, edge_index))
    want = model(x, edge_index).detach()

    def less_error(plan: BitPlan) -> float:
        quantizer.set_plan(plan)
        with quantizer, torch.no_grad():
            return -float((model(x, edge_index) - want).norm() / want.norm())

    space = SearchSpace({tuple(place): (1, 2, 4, 8, 16) for place in quantizer.places()})
    more = SMALL | {"measurements": 40, "rounds": 8, "per_round": 4}  # there are eight places
    smaller_than_one_width(
        AutoBitSelector(space, less_error, lambda plan: quantizer.memory(plan).packed_bytes, tolerance=0.1, **more)
    )
