"""The command line: ``lightning-tinykg fit | validate | test | predict | profile | export --config FILE``.

Any LightningModule and any LightningDataModule by class path, typed by their signatures, from YAML or from arguments::

    lightning-tinykg fit --model my_pkg.MyModel --data my_pkg.MyData --trainer.strategy ddp_tinykg
    lightning-tinykg fit --model my_pkg.MyModel --print_config > run.yaml
    lightning-tinykg profile --config run.yaml --steps 3 --widths 32 8 4 2 1 --out profile/
    lightning-tinykg export --config hqgnn.yaml --ckpt_path last.ckpt --out index/
    lightning-tinykg recommend --index index/ --users 0 1 2

In YAML, compression is one callback; ``bits`` is a width, a schedule, or a plan from a file::

    trainer:
      callbacks:
        - class_path: lightning_tinykg.TinyKGCallback
          init_args:
            bits: {class_path: lightning_tinykg.CosineAnneal, init_args: {start: 8, end: 2, steps: 2000}}
            # bits: 2
            # bits: {class_path: lightning_tinykg.BitPlan.load, init_args: {path: plan.yaml}}
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.cli import LightningCLI
from rich.console import Console

from lightning_tinykg.hqgnn.commands import export_checkpoint
from lightning_tinykg.profiling import profile

_IN_ONE_PROCESS = ("profile", "export")
"""Subcommands that are ours."""


class TinyKGTrainer(Trainer):
    """Lightning's Trainer, which can also ``profile`` and ``export``.

    Example:
        >>> TinyKGTrainer(accelerator="cpu", logger=False, enable_checkpointing=False).world_size
        1
    """

    def profile(
        self,
        model: LightningModule,
        datamodule: LightningDataModule | None = None,
        steps: int = 3,
        widths: Sequence[int] = (32, 8, 4, 2, 1),
        paper: bool = True,
        recompute: Sequence[str] = ("off", "aggressive"),
        scan: int = 200,
        out: str = "tinykg_profile",
        ckpt_path: str | None = None,
    ) -> None:
        """Show what compression would gain, before training: bytes by module and op, and the gradient's error.

        Runs on one device; nothing is trained.

        Args:
            model: any LightningModule.
            datamodule: its data.
            steps: batches to measure, of each type.
            widths: bits to try: 1, 2, 4, 8, 32.
            paper: whether to try the paper's recipe as well.
            recompute: settings of recompute to try as well, besides the default: off, aggressive.
            scan: batches to look through for other types of batch, which may come late in an epoch.
            out: folder for profile.json, ops.csv, curve.csv and profile.png.
            ckpt_path: a checkpoint whose weights to measure at.
        """
        options: dict[str, Any] = {"steps": steps, "widths": widths, "paper": paper, "scan": scan}
        options["recompute"] = recompute
        result = profile(self, model, datamodule, ckpt_path=ckpt_path, **options)
        console = Console()
        console.width = max(console.width, 120)  # a narrow terminal or a file would cut the figures
        console.print(result)
        console.print(f"Written to {result.save(Path(out))}/")

    def export(
        self,
        model: LightningModule,
        datamodule: LightningDataModule | None = None,
        ckpt_path: str | None = None,
        out: str = "export",
        dataset: str | None = None,
    ) -> None:
        """Write an `HQGNN`'s codes, scales, ids and seen items to a folder that a service can answer from.

        Nothing is trained or tested. ``lightning-tinykg recommend --index OUT --users 0 1`` answers from it.

        Args:
            model: an ``HQGNN``, made as for its training.
            datamodule: its data.
            ckpt_path: the checkpoint with its weights.
            out: folder to write.
            dataset: name of the data set, for the card; None: the data module's folder.
        """
        options = {} if dataset is None else {"dataset": dataset}
        index = export_checkpoint(model, datamodule, ckpt_path, out, **options)
        console = Console()
        console.print(index)
        console.print(f"Written to {out}/", soft_wrap=True)


class TinyKGCLI(LightningCLI):
    """LightningCLI with ``profile`` and ``export``; model and data by class path unless their classes are given.

    Takes LightningCLI's arguments. The seed is 0 unless the configuration says otherwise, and no configuration is
    written beside the run: ``--print_config`` prints it.

    Raises:
        SystemExit: if jsonargparse is not installed.

    Example:
        >>> sorted(TinyKGCLI.subcommands())
        ['export', 'fit', 'predict', 'profile', 'test', 'validate']
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        missing = [name for name in ("jsonargparse", "docstring_parser") if not _installed(name)]
        if missing:
            raise SystemExit(
                f"the command line needs {' and '.join(missing)}, which is not installed: "
                "pip install 'lightning-tinykg[cli]'"
            )
        options: dict[str, Any] = {"save_config_callback": None, "seed_everything_default": 0}
        super().__init__(*args, **{"trainer_class": TinyKGTrainer} | options | kwargs)

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """Lightning's, ``profile`` and ``export``."""
        return {**LightningCLI.subcommands(), **{name: {"model", "datamodule"} for name in _IN_ONE_PROCESS}}

    def parse_arguments(self, parser: Any, args: Any) -> None:
        """Parse, with ``--widths 8 2`` for what jsonargparse writes ``--widths [8,2]``."""
        if args is None or isinstance(args, list):
            self.config = parser.parse_args(_listed(sys.argv[1:] if args is None else args, "--widths"))
        else:
            super().parse_arguments(parser, args)

    def _parse_ckpt_path(self) -> None:
        """Merge a checkpoint's hyper-parameters into the configuration, where Lightning can.

        It can't, and would stop, if one of them describes a module: that is no argument, but what
        ``load_from_checkpoint`` makes it again from (``HQGNN``'s encoder). Nor if no command line trained the model, so
        that they do not say of which class they are. The configuration is then taken as it is.
        """
        subcommand = self.config.get("subcommand")
        path = self.config[subcommand].get("ckpt_path") if subcommand else None
        if path and Path(path).is_file():
            # on no device, for what is asked are a few numbers and not the weights
            saved = torch.load(path, weights_only=True, map_location="meta").get("hyper_parameters", {})
            if any(isinstance(value, Mapping) and "class_path" in value for value in saved.values()):
                return
            if self.subclass_mode_model and "_class_path" not in saved:
                return
        super()._parse_ckpt_path()

    def before_instantiate_classes(self) -> None:
        """Profile and export in one process, whatever a configuration for training says."""
        if self.subcommand in _IN_ONE_PROCESS:
            for name, value in (("devices", 1), ("num_nodes", 1), ("strategy", "auto")):
                self.config[f"{self.subcommand}.trainer.{name}"] = value


def main(args: list[str] | None = None) -> None:
    """What ``lightning-tinykg`` runs.

    Args:
        args: the command line; None: that of the process.

    Example:
        >>> names = ["progress_bar", "model_summary", "checkpointing"]
        >>> options = ["accelerator=cpu", "logger=false", "fast_dev_run=1", *(f"enable_{name}=false" for name in names)]
        >>> model = "--model=lightning.pytorch.demos.boring_classes.BoringModel"
        >>> main(["fit", model, *(f"--trainer.{option}" for option in options)])
    """
    here = str(Path.cwd())
    if here not in sys.path:  # where a user's own module is, which `python -m` would find and a console script does not
        sys.path.insert(0, here)
    TinyKGCLI(args=args)


def _installed(name: str) -> bool:
    return find_spec(name) is not None


def _listed(args: list[str], option: str) -> list[str]:
    """The arguments, with the numbers that follow an option made one list."""
    if option not in args:
        return args
    start = stop = args.index(option) + 1
    while stop < len(args) and args[stop].isdigit():
        stop += 1
    return [*args[:start], f"[{','.join(args[start:stop])}]", *args[stop:]] if stop > start else args


if __name__ == "__main__":
    main()
