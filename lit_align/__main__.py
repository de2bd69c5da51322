"""The entry point: quiets what is not for the user before the libraries that say it are imported."""

import logging
import os
import signal
import warnings

HARMLESS = (
    r".*module\(s\) in eval mode at the start of training.*",  # frozen parts are meant to be
    r".*isinstance\(treespec, LeafSpec\).* is deprecated.*",  # lightning 2.6 on torch 2.13
    r".*It is recommended to use `self.log\(.*sync_dist=True.*",  # our metrics are reduced over ranks already
)


def main() -> None:
    """Run the command line."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # image processors that we do not use miss torchvision
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # its CPU kernels are optional
    for message in HARMLESS:
        warnings.filterwarnings("ignore", message)
    from lit_align.cli import main as run  # late: importing takes seconds and prints what is filtered above

    try:
        run()
    except Exception:
        # SLURM ends the other ranks of a failed run. This one is failing too: its exit code is to be that of its error.
        for number in (signal.SIGTERM, signal.SIGUSR1):
            signal.signal(number, signal.SIG_IGN)
        raise


if __name__ == "__main__":
    main()
