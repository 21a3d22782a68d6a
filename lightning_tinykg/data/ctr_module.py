"""The data module of the CTR protocol: labelled pairs instead of rankings."""

from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from lightning.pytorch.utilities import rank_zero_info
from torch.utils.data import DataLoader
from torch.utils.data.distributed import DistributedSampler

from lightning_tinykg.data.ctr import NEGATIVE, CTRBatch, CTRBatches, CTRChunks, label_pairs, split_pairs
from lightning_tinykg.data.files import unique_pairs
from lightning_tinykg.data.graph import build_graph
from lightning_tinykg.data.module import KGRecDataModule
from lightning_tinykg.data.synthetic import SyntheticKG

__all__ = ["CTRDataModule"]


class CTRDataModule(KGRecDataModule):
    """Interactions and a knowledge graph for click-through-rate prediction, as KGCN and KGNN-LS are evaluated.

    Every interaction is a positive. For each user as many items without interaction are sampled once as negatives, and
    the labelled pairs are cut at random into training, validation and test set, 6 : 2 : 2 by default (Wang et al., WWW
    2019, section 3.3; hwwang55/KGCN, `preprocess.py` and `data_loader.py`). A split that the files bring is not used.

    Batches are :class:`~lightning_tinykg.data.CTRBatch` in training and in evaluation. Everything else is as in
    :class:`~lightning_tinykg.data.KGRecDataModule`: `graph` holds the training positives as its interactions, and the
    training negatives as edges ``("user", "negative", "entity")``.

    Args:
        root: The data, as for :class:`~lightning_tinykg.data.KGRecDataModule`.
        batch_size: Labelled pairs in a training batch.
        eval_batch_size: Labelled pairs in an evaluation batch.
        val_fraction: Share of the labelled pairs for validation; 0: none.
        test_fraction: Share of the labelled pairs for testing.
        seed: Seed of the negatives, the split and the shuffling.
        cache_dir: Where parsed files are kept; None: ``lightning_tinykg`` in the user's cache folder; False: nowhere.
        num_workers: Worker processes that make training batches.
        pin_memory: Put batches into pinned memory, for faster copies to a GPU.
        reader_options: Passed to :func:`~lightning_tinykg.data.read_folder`, such as ``min_rating``.

    Raises:
        ValueError: If an argument is out of range.

    Example:
        >>> data = CTRDataModule("synthetic:1000", batch_size=100)
        >>> data.setup("fit")
        >>> {name: pairs.shape[1] for name, pairs in data.labelled.items()}
        {'train': 503, 'val': 167, 'test': 167}
    """

    def __init__(
        self,
        root: str | Path | SyntheticKG = "synthetic",
        *,
        batch_size: int = 128,
        eval_batch_size: int = 4096,
        val_fraction: float = 0.2,
        test_fraction: float = 0.2,
        seed: int = 0,
        cache_dir: str | Path | Literal[False] | None = None,
        num_workers: int = 0,
        pin_memory: bool = False,
        reader_options: dict[str, Any] | None = None,
    ) -> None:
        super().__init__(
            root,
            batch_size=batch_size,
            eval_batch_size=eval_batch_size,
            val_fraction=val_fraction,
            test_fraction=test_fraction,
            seed=seed,
            cache_dir=cache_dir,
            num_workers=num_workers,
            pin_memory=pin_memory,
            reader_options=reader_options,
        )

    def setup(self, stage: str | None = None) -> None:
        """Read, sample the negatives, split, build the graph. Calling it again does nothing.

        Args:
            stage: Ignored: all stages share the graph.

        Raises:
            FileNotFoundError: If the folder or a file is missing.
            ValueError: If a file is malformed, or nothing is left for training.
        """
        if self._ready:
            return
        self.files = self._read()
        given = [self.files.train] + ([] if self.files.test is None else [self.files.test])
        pairs = unique_pairs(np.concatenate(given, axis=1))
        labelled = label_pairs(pairs, num_users=self.num_users, num_items=self.num_items, seed=self.seed)
        fractions = {"val_fraction": self.val_fraction, "test_fraction": self.test_fraction}
        parts = split_pairs(labelled, **fractions, seed=self.seed)
        self.labelled = dict(zip(("train", "val", "test"), parts, strict=True))
        positive = {name: part[:2, part[2] == 1] for name, part in self.labelled.items()}
        self.train_pairs, self.val_pairs, self.test_pairs = positive.values()
        self.graph = build_graph(
            self.train_pairs,
            self.files.triples,
            num_users=self.num_users,
            num_items=self.num_items,
            num_entities=self.num_entities,
            num_relations=self.num_relations,
        )
        train = self.labelled["train"]
        self.graph[NEGATIVE].edge_index = torch.from_numpy(train[:2, train[2] == 0])
        self.statistics = {
            "users": self.num_users,
            "items": self.num_items,
            "entities": self.num_entities,
            "relations": self.num_relations,
            "triples": self.files.triples.shape[1],
            "positives": pairs.shape[1],
            **{f"{name}_pairs": part.shape[1] for name, part in self.labelled.items()},
        }
        self._ready = True
        rank_zero_info(self._summary())

    def train_dataloader(self) -> Any:
        """One epoch of labelled training pairs."""
        batches = CTRBatches(self.labelled["train"], batch_size=self.batch_size)
        return self._resumable(batches)

    def val_dataloader(self) -> Any:
        """The validation pairs. No loader if there are none."""
        return self._chunks("val")

    def test_dataloader(self) -> Any:
        """The test pairs. No loader if there are none."""
        return self._chunks("test")

    def _chunks(self, name: str) -> Any:
        if not self.labelled[name].shape[1]:
            return []
        chunks = CTRChunks(self.labelled[name], chunk=self.eval_batch_size, **self._shard())
        # Already sharded, see KGRecDataModule._ranking.
        sampler: DistributedSampler[CTRBatch] = DistributedSampler(chunks, num_replicas=1, rank=0, shuffle=False)
        return DataLoader(chunks, sampler=sampler, batch_size=None, **self._loader_options(workers=0))

    def _summary(self) -> str:
        n = self.statistics
        name = "synthetic" if isinstance(self.root, SyntheticKG) else str(self.root)
        return (
            f"{name}: {n['users']:,} users, {n['items']:,} items, {n['entities']:,} entities, "
            f"{n['relations']:,} relations, {n['triples']:,} triples; {n['positives']:,} positives; labelled pairs: "
            f"{n['train_pairs']:,} train, {n['val_pairs']:,} val, {n['test_pairs']:,} test"
        )
