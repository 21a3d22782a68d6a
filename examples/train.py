"""Train, validate and test a recommender from a YAML file: `lightning-tinykg`, with the test that follows a fit.

    python examples/train.py fit --config examples/configs/kgat-synthetic.yaml
    python examples/train.py fit --config examples/configs/kgat-music.yaml --data.root PATH/TO/music
    python examples/train.py test --config examples/configs/kgat-music.yaml --data.root PATH/TO/music --ckpt_path CKPT
    python examples/train.py profile --config examples/configs/kgat-synthetic.yaml

Any argument of the model, the data module and the Trainer can be overridden on the command line, such as
`--model.init_args.lr 0.01` or `--trainer.max_epochs 5`. Needs `pip install lightning-tinykg[cli]`.
"""

from lightning_tinykg.cli import TinyKGCLI
from lightning_tinykg.data import KGRecDataModule
from lightning_tinykg.models import RankingModule


class RecommenderCLI(TinyKGCLI):
    """Fits, then tests once with the checkpoint that was best on the validation set."""

    def after_fit(self) -> None:
        """Test what was kept."""
        if not self.trainer.fast_dev_run:  # which keeps no checkpoint
            self.trainer.test(ckpt_path="best", datamodule=self.datamodule)


def main() -> RecommenderCLI:
    # the YAML's class_path says which model, and which data
    return RecommenderCLI(RankingModule, KGRecDataModule, subclass_mode_model=True, subclass_mode_data=True)


if __name__ == "__main__":
    main()
