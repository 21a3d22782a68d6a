"""The callback, unchanged, in Ray Train: where one machine is not enough. Needs the extra ``ray``.

    pip install "lightning-tinykg[ray]"
    python examples/ray_train.py --workers 2
    python examples/ray_train.py --workers 8 --gpu --data PATH/TO/last-fm

Ray starts a process for each worker, on any machine of its cluster, and gives Lightning its strategy and environment;
the module, the data and ``TinyKGCallback`` are those of any other run.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import lightning as L
import ray
from ray.train import Checkpoint, RunConfig, ScalingConfig
from ray.train.lightning import RayDDPStrategy, RayLightningEnvironment, prepare_trainer
from ray.train.torch import TorchTrainer
from rich.console import Console

from lightning_tinykg import KGAT, KGRecDataModule, TinyKGCallback


def train(config: dict[str, Any]) -> None:
    """What each worker runs."""
    L.seed_everything(0, verbose=False)
    trainer = L.Trainer(
        strategy=RayDDPStrategy(find_unused_parameters=True),  # KGAT has two losses
        plugins=[RayLightningEnvironment()],
        callbacks=[TinyKGCallback(bits=config["bits"], summary=False)],
        max_epochs=config["epochs"],
        accelerator="gpu" if config["gpu"] else "cpu",
        devices="auto" if config["gpu"] else 1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer = prepare_trainer(trainer)
    trainer.fit(KGAT(dim=32, layer_dims=[32, 16]), KGRecDataModule(config["data"], triple_batch_size="auto"))
    metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
    with TemporaryDirectory() as folder:
        trainer.save_checkpoint(Path(folder) / "model.ckpt")
        # Ray keeps what is reported with a checkpoint
        ray.train.report(metrics, checkpoint=Checkpoint.from_directory(folder) if trainer.is_global_zero else None)


def main() -> None:
    """Start the workers, and print what the first reported."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="synthetic:1000", help="as for KGRecDataModule")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--gpu", action="store_true", help="a GPU for each worker")
    parser.add_argument("--bits", type=int, default=8)
    parser.add_argument("--epochs", type=int, default=2)
    args = parser.parse_args()
    scaling = ScalingConfig(num_workers=args.workers, use_gpu=args.gpu)
    result = TorchTrainer(train, train_loop_config=vars(args), scaling_config=scaling, run_config=RunConfig()).fit()
    assert result.metrics is not None
    Console().print(result.checkpoint)
    for name in ("train/loss", "val/recall@20", "tinykg/bits", "tinykg/ratio"):
        Console().print(f"{name} {result.metrics[name]:.4f}")


if __name__ == "__main__":
    main()
