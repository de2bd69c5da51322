"""Command line of `lit-align doctor`: takes the options of `fit`, and does not train."""

from jsonargparse.typing import PositiveFloat
from lightning.pytorch.cli import LightningArgumentParser

from lit_align.commands.doctor.command import doctor
from lit_align.commands.doctor.run_parts import RunParts
from lit_align.commands.fit import ConfigCLI, make_cli


class DoctorCLI(ConfigCLI):
    """Parses the options of `fit`; `RunParts` instantiates them part by part."""

    description = (
        "Check, without training, whether a run would start, what memory it needs and what to change. "
        "Ends with status 1 if it would not start."
    )

    example = "--config configs/mapo_sdxl.yaml --memory 24"

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        super().add_arguments_to_parser(parser)
        parser.add_argument(
            "--memory",
            type=PositiveFloat | None,
            help="GB (10^9 bytes) of each GPU, to check a run on another machine's GPUs",
        )

    def run(self) -> int:
        """Print the report and return the exit code."""
        found = doctor(RunParts(self.parser, self.config, self._instantiate_trainer), self.config.memory)
        print(found.text())
        return 1 if found.errors else 0


def run_doctor(words: list[str]) -> None:
    """Print the report for the words after `doctor`; exit with code 1 if the run would not start."""
    raise SystemExit(make_cli(DoctorCLI, words, run=False, prog="lit-align doctor").run())
