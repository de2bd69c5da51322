"""Command line of `lit-align encode`: takes the config of `fit` and options of its own."""

from lightning.pytorch.cli import LightningArgumentParser

from lit_align.commands.encode.command import encode
from lit_align.commands.fit import AlignmentCLI, make_cli


class EncodeCLI(AlignmentCLI):
    """Parses the config of a training run, and instantiates nothing of it."""

    description = "Encode all images and prompts of a training config's shards into a cache; a killed run resumes."
    example = "--config configs/mapo_sdxl.yaml --output cache/train"

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        super().add_arguments_to_parser(parser)
        self.options = parser.add_function_arguments(encode, skip={"backbone", "data"}, as_positional=False)
        for name in ("ckpt_path", "weights_only"):
            parser.add_argument(f"--{name}", help="accepted because configs of runs have it; not used")

    def _set_seed(self) -> None:
        """Leave the global seed alone: nothing here is random."""

    def before_instantiate_classes(self) -> None:
        """Skip the checks of a training run."""

    def instantiate_classes(self) -> None:
        """Instantiate nothing: `encode` loads the encoders alone."""

    def run(self) -> None:
        """Encode with the config's backbone and data."""
        config = self.config
        encode(config.model.backbone, config.data, **{name: config[name] for name in self.options})


def run_encode(words: list[str]) -> None:
    """Fill a cache as the words after `encode` say."""
    make_cli(EncodeCLI, words, run=False, prog="lit-align encode").run()
