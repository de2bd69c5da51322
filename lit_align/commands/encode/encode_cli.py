"""Command line of `lit-align encode`: takes the config of `fit` and options of its own."""

from lightning.pytorch.cli import LightningArgumentParser

from lit_align.commands.encode.command import encode
from lit_align.commands.fit import ConfigCLI, make_cli


class EncodeCLI(ConfigCLI):
    """Parses the options of `fit` and of `encode`."""

    description = "Encode all images and prompts of a training config's shards into a cache; a killed run resumes."
    example = "--config configs/mapo_sdxl.yaml --output cache/train"

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        super().add_arguments_to_parser(parser)
        self.options = parser.add_function_arguments(encode, skip={"backbone", "data"}, as_positional=False)

    def before_instantiate_classes(self) -> None:
        """Skip the checks of a training run."""

    def run(self) -> None:
        """Encode with the config's backbone and data."""
        config = self.config
        encode(config.model.backbone, config.data, **{name: config[name] for name in self.options})


def run_encode(words: list[str]) -> None:
    """Fill a cache as the words after `encode` say."""
    make_cli(EncodeCLI, words, run=False, prog="lit-align encode").run()
