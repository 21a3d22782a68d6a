"""On a GPU KGAT gives what it gives on a CPU, compressed or not, and TransR's step never waits for the device."""

from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch_geometric.data import HeteroData

from lightning_tinykg import compress_activations
from lightning_tinykg.data.batches import TripleBatch
from lightning_tinykg.models import KGAT

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")]

TRIPLES = TripleBatch(
    torch.tensor([7, 0, 4]),
    torch.tensor([0, 1, 4]),
    torch.tensor([1, 4, 1]),
    torch.tensor([2, 5, 3]),
    [1, 1, 0, 0, 1, 0],
)


@pytest.fixture
def waits() -> Iterator[None]:
    """An error where somebody waits for the device."""
    yield
    torch.cuda.set_sync_debug_mode("default")


def model_of(graph: HeteroData, attention: Any, device: str) -> KGAT:
    torch.manual_seed(0)
    model = KGAT(8, [8, 4], relation_dim=6, attention=attention, dropout=0.0)
    model.log = lambda *args, **kwargs: None  # type: ignore[method-assign]  # a stand-in
    model.set_graph(graph)
    return model.to(device)


@pytest.mark.parametrize("bits", [None, 32])
@pytest.mark.parametrize("attention", ["refresh", "frozen", "in-graph"])
def test_embeddings_and_gradients_are_those_of_a_cpu(tiny: HeteroData, attention: str, bits: int | None) -> None:
    found = []
    for device in ("cpu", "cuda"):
        model = model_of(tiny, attention, device)
        with nullcontext() if bits is None else compress_activations(bits, min_bytes=0):
            users, entities = model.embed()
            loss = users.sin().sum() + entities.square().sum()
        (gradient,) = torch.autograd.grad(loss, model.embedding.weight)
        found.append([part.cpu() for part in (users, entities, gradient)])
    torch.testing.assert_close(found[0], found[1])


@pytest.mark.parametrize("bits", [None, 2])
@pytest.mark.usefixtures("waits")
def test_a_step_of_triples_does_not_wait(tiny: HeteroData, bits: int | None) -> None:
    model = model_of(tiny, "frozen", "cuda")
    batch = TripleBatch(*(ids.cuda() for ids in TRIPLES[:4]), counts=TRIPLES.counts)

    def step() -> None:
        with nullcontext() if bits is None else compress_activations(bits, min_bytes=0):
            loss = model.training_step(batch, 0)
        assert isinstance(loss, torch.Tensor)
        loss.backward()

    step()  # which builds what is built once
    torch.cuda.set_sync_debug_mode("error")
    step()
