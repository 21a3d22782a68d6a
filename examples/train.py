"""Train, validate and test a recommender from a YAML file, with LightningCLI.

    python examples/train.py fit --config examples/configs/kgat-synthetic.yaml
    python examples/train.py fit --config examples/configs/kgat-music.yaml --data.root PATH/TO/music
    python examples/train.py test --config examples/configs/kgat-music.yaml --data.root PATH/TO/music --ckpt_path CKPT

Any argument of the model, the data module and the Trainer can be overridden on the command line, such as
`--model.init_args.lr 0.01` or `--trainer.max_epochs 5`. Needs `pip install lightning-tinykg[cli]`.
"""

from lightning.pytorch.cli import LightningCLI

from lightning_tinykg.data import KGRecDataModule
from lightning_tinykg.models import RankingModule


class RecommenderCLI(LightningCLI):
    """Fits, then tests once with the checkpoint that was best on the validation set."""

    def after_fit(self) -> None:
        """Test what was kept."""
        if not self.trainer.fast_dev_run:  # which keeps no checkpoint
            self.trainer.test(ckpt_path="best", datamodule=self.datamodule)


def main() -> LightningCLI:
    return RecommenderCLI(
        RankingModule,
        KGRecDataModule,
        subclass_mode_model=True,  # the YAML's model.class_path says which
        seed_everything_default=0,
        save_config_callback=None,
    )


if __name__ == "__main__":
    main()
