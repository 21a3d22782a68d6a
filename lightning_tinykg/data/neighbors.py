"""Neighbour-sampled training batches through PyG's ``LinkNeighborLoader``."""

from typing import Any

import numpy as np
import torch
import torch_geometric.typing
from torch import Tensor
from torch.utils.data.distributed import DistributedSampler
from torch_geometric.data import HeteroData
from torch_geometric.loader import LinkNeighborLoader
from torch_geometric.sampler import NegativeSampling

from lightning_tinykg.data.graph import INTERACTS, add_inverse_edges
from lightning_tinykg.data.sampling import NegativeSampler

__all__ = ["neighbor_loader", "require_neighbor_sampler"]


def require_neighbor_sampler() -> None:
    """Make sure that PyG can sample neighbours.

    Raises:
        ImportError: If neither pyg-lib nor torch-sparse can be imported.
    """
    if not (torch_geometric.typing.WITH_PYG_LIB or torch_geometric.typing.WITH_TORCH_SPARSE):
        raise ImportError(
            "sampling='neighbor' needs pyg-lib or torch-sparse, and neither can be imported: "
            "pip install 'lightning-tinykg[sampling]' -f https://data.pyg.org/whl/torch-TORCH_VERSION.html, "
            "or use sampling='full'"
        )


class _UserNegatives(NegativeSampling):  # type: ignore[misc]  # PyG is untyped here
    """Triplet negatives for the users of the batch at hand, instead of PyG's, which may be positives and no items."""

    def __init__(self, sampler: NegativeSampler) -> None:
        super().__init__("triplet", amount=1)
        self.sampler = sampler
        self.users = np.zeros(0, dtype=np.int64)
        self.rng = np.random.default_rng(0)

    def sample(self, num_samples: int, endpoint: str, num_nodes: int | None = None) -> Tensor:
        if num_samples != self.users.size or endpoint != "dst":
            raise ValueError(f"expected {self.users.size} negatives of 'dst', got {num_samples} of {endpoint!r}")
        return torch.from_numpy(self.sampler.sample(self.users, self.rng))


class _SeededLinkNeighborLoader(LinkNeighborLoader):  # type: ignore[misc]  # PyG is untyped here
    """Draws negatives and neighbours of a batch as a function of the seed and the batch, off the global RNG."""

    def __init__(self, *args: Any, seed: int, **kwargs: Any) -> None:
        self.seed = seed
        super().__init__(*args, **kwargs)

    def collate_fn(self, index: Tensor | list[int]) -> Any:
        index = torch.as_tensor(index)
        # A shuffled epoch never begins a batch with the same edges again: they tell epoch, step and rank apart.
        rng = np.random.default_rng([self.seed, 3, *index[:4].tolist()])
        self.neg_sampling.users = self.input_data.row[index].numpy()
        self.neg_sampling.rng = rng
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(int(rng.integers(2**62)))
            return super().collate_fn(index)


def neighbor_loader(
    graph: HeteroData,
    *,
    num_neighbors: tuple[int, ...],
    batch_size: int,
    seed: int = 0,
    num_replicas: int = 1,
    rank: int = 0,
    num_workers: int = 0,
    pin_memory: bool = False,
) -> LinkNeighborLoader:
    """Batches of training interactions with a negative each and the neighbourhood of all three.

    Negatives are items the user has not interacted with. Seed edges are not taken out of the sampled neighbourhoods, as
    they are not in full-graph training. Messages flow both ways: inverse edges are edge types of their own.

    Args:
        graph: The training graph.
        num_neighbors: Neighbours per edge type and hop.
        batch_size: Interactions in a batch.
        seed: Seed of the order, the negatives and the neighbours.
        num_replicas: Number of ranks.
        rank: This rank.
        num_workers: Worker processes.
        pin_memory: Put batches into pinned memory.

    Returns:
        A loader of :data:`~lightning_tinykg.data.SampledBatch`.

    Raises:
        ImportError: If neither pyg-lib nor torch-sparse can be imported.
        ValueError: If a user has interacted with every item.
    """
    require_neighbor_sampler()
    pairs = graph[INTERACTS].edge_index
    negatives = NegativeSampler(
        pairs[0].numpy(), pairs[1].numpy(), num_rows=int(graph["user"].num_nodes), num_columns=int(graph.num_items)
    )
    # Lightning knows this sampler: it is not replaced, and its epoch is set.
    order: DistributedSampler[int] = DistributedSampler(
        range(pairs.shape[1]),  # type: ignore[arg-type]  # only its length is asked for
        num_replicas=num_replicas,
        rank=rank,
        shuffle=True,
        seed=seed,
    )
    return _SeededLinkNeighborLoader(
        add_inverse_edges(graph),
        num_neighbors=list(num_neighbors),
        edge_label_index=(INTERACTS, pairs),
        neg_sampling=_UserNegatives(negatives),
        batch_size=batch_size,
        sampler=order,
        seed=seed,
        num_workers=num_workers,
        pin_memory=pin_memory,
        generator=torch.Generator().manual_seed(seed),
    )
