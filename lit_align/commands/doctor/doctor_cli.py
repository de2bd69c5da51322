"""`lit-align doctor` on the command line: it takes what `fit` takes, and trains nothing."""

from jsonargparse.typing import PositiveFloat
from lightning.pytorch.cli import LightningArgumentParser

from lit_align.commands.doctor.command import doctor
from lit_align.commands.doctor.run_parts import RunParts
from lit_align.commands.fit import AlignmentCLI, make_cli


class DoctorCLI(AlignmentCLI):
    """Understands what `fit` understands, and instantiates nothing of it."""

    description = (
        "Say whether a training run would start, what memory it would need and what to change, without training. "
        "Ends with status 1 where it would not start."
    )

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        super().add_arguments_to_parser(parser)
        parser.add_argument(
            "--memory",
            type=PositiveFloat | None,
            help="GB (10^9 bytes) of each GPU that the run is to have, for GPUs that this machine does not have",
        )
        parser.add_argument("--ckpt_path", type=str | None, help="checkpoint that the run is to go on from")
        parser.add_argument("--weights_only", type=bool | None, help="as in a run's own config; nothing comes of it")

    def _set_seed(self) -> None:
        """Nothing here draws."""

    def instantiate_classes(self) -> None:
        """The parts are made one by one, see `RunParts`."""

    def run(self) -> int:
        """Print the report; returns the exit code."""
        found = doctor(RunParts(self.parser, self.config, self._instantiate_trainer), self.config.memory)
        print(found.text())
        return 1 if found.errors else 0


def run_doctor(words: list[str]) -> None:
    """Print the report; exit with code 1 if the run would not start. `words` follow `doctor` on the command line."""
    raise SystemExit(make_cli(DoctorCLI, words, run=False, prog="lit-align doctor").run())
