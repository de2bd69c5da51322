"""Explain a user's mistake in one to three lines in place of a traceback."""

import difflib
import re
import textwrap
from collections.abc import Iterator
from importlib import import_module

from lit_align.commands.shared.schedule_mistakes import explain_schedule
from lit_align.user_errors import UserError

WIDTH = 600  # characters of a library's message that are shown
EXTRAS = {  # packages that only some options need, and the extra of lit-align that brings them
    "bitsandbytes": "8bit",
    "matplotlib": "report",
    "simplejpeg": "fast",
    "s3fs": "s3",
    "gcsfs": "gcs",
    "resvg_py": "recipe",
    "shtab": "completion",
}
REMEDIES = {  # by the name of a library's exception
    "OfflineModeIsEnabled": "Allow the network (unset HF_HUB_OFFLINE), or name a local folder.",
    "LocalEntryNotFoundError": "It is not in the local cache and the hub cannot be reached: allow the network (unset "
    "HF_HUB_OFFLINE), or name a local folder.",
    "GatedRepoError": "Accept the terms on its page at huggingface.co, then run `hf auth login`.",
    "RepositoryNotFoundError": "Check the name; a private repository needs `hf auth login`.",
    "RevisionNotFoundError": "Check the revision: a branch, a tag or a commit.",
    "EntryNotFoundError": "Check the names of the repository, its subfolder and the variant.",
    "HfHubHTTPError": "Check the network and try again.",
    "HFValidationError": "Name a local folder that exists, or a repository on the hub as OWNER/NAME.",
    "ConnectError": "Check the network, or set HF_HUB_OFFLINE=1 if all files are in the local cache.",
    "ConnectionError": "Check the network, or set HF_HUB_OFFLINE=1 if all files are in the local cache.",
    "MisconfigurationException": "Correct the option of `trainer` that it names.",
    "OutOfMemoryError": "Lower the batch size (data.batch_size with a higher trainer.accumulate_grad_batches, or "
    "--batch_size); lit-align doctor estimates what a run needs.",
    "SafetensorError": "The file of weights is damaged or incomplete: fetch or write it again.",
    "YAMLError": "Correct the YAML file.",
}
NO_GPU = "accelerator: this machine has no GPU that torch can use. Set it to cpu (fit: --trainer.accelerator cpu)."
CLASSES = {"objective": "lit_align.objectives", "backbone": "lit_align.backbones", "callbacks": "lit_align.callbacks"}


def explain(error: BaseException) -> str | None:
    """One to three lines that say what to do, or None if the error is not the user's to correct."""
    message = str(error)
    if "No supported gpu backend" in message or "CUDAAccelerator` can not run" in message:
        return NO_GPU
    if isinstance(error, UserError):
        return explain_parsing(message) if "Parser key" in message else "\n".join(message.splitlines()[:3])
    for kind in type(error).__mro__:
        if kind.__name__ in REMEDIES and kind.__module__ != "builtins":
            return f"{shorten(message)}\n{REMEDIES[kind.__name__]}"
    if isinstance(error, ModuleNotFoundError):
        return missing_extra(message)
    return _explain_file(error) if isinstance(error, OSError) else None


def shorten(message: str) -> str:
    """A library's message as one line."""
    return textwrap.shorten(message, WIDTH, placeholder=" ...")


def explain_parsing(message: str) -> str:
    """A message of jsonargparse as one line: the key, its value and what the value must be."""
    message = re.sub(r"Call to compute_fn of link .* failed: ", "", message)
    message = re.sub(r"Subcommand '\w+' does not accept option '(.*)'", r"there is no option '\1'", message)
    if schedule := explain_schedule(message):
        return schedule
    if required := re.search(r"arguments are required: (.*)", message):
        names = re.sub(r"\b(fit|validate)\.", "", required[1])
        return f"missing: {names}. Give them as options, or in a file: --config FILE."
    if (key := re.search(r'Parser key "([^"]+)":\s*', message)) is None:
        return shorten(message)
    before, rest = message[: key.start()], message[key.end() :]
    while inner := re.match(r'Parser key "([^"]+)":\s*', rest):
        rest = rest[inner.end() :]
    return shorten(f"{before}{_explain_class(key[1], rest) or _explain_value(key[1], rest) or f'{key[1]}: {rest}'}")


def _explain_class(key: str, rest: str) -> str | None:
    if problem := re.search(r"Problem with given class_path '([^']+)':\s*(?:- )?(.*)", rest, re.DOTALL):
        name, reason = problem[1], re.split(r"\n\s*(?:- (?:Expected|Not)|Given value)", problem[2])[0]
        if "has no attribute" not in reason and "not a valid subclass" not in reason.lower():
            return f"{key}: {name}: {explain_parsing(reason)}"
    elif found := re.search(r"Expected a dot import path string: (\S+)", rest):
        name = found[1]
    else:
        return None
    module = next((module for part, module in CLASSES.items() if part in key.split(".")), None)
    choices = sorted(import_module(module).__all__) if module else []
    nearest = difflib.get_close_matches(name.split(".")[-1], choices, n=1, cutoff=0.5)
    question = f" Do you mean {nearest[0]}?" if nearest else f" Choose from {', '.join(choices)}." if choices else ""
    return f"{key}: there is no class {name!r}.{question}"


def _explain_value(key: str, rest: str) -> str | None:
    value = re.search(r"(?:Got value|Given value): (.*)", rest)
    kinds = re.findall(r"Expected an? (.*?)(?:\. Got value.*)?(?:\n|$)", rest)
    if value is None or not kinds:
        return None
    kinds = [
        re.sub(r"<class '(?:\w+\.)*(\w+)'>", r"\1", re.sub(r"typing\.Literal\[(.*)\]", r"one of \1", kind))
        for kind in kinds
    ]
    kinds = [kind for kind in dict.fromkeys(kinds) if kind != "NoneType"]
    return f"{key} is {value[1]}; it must be {' or '.join(kinds)}."


def missing_extra(message: str) -> str | None:
    """Name the extra that brings a missing package."""
    for package, extra in EXTRAS.items():
        if f"No module named '{package}" in message:
            how = f"pip install -e '.[{extra}]' in its checkout"
            return f"No module named '{package}'\nInstall {package}, lit-align's extra {extra}: {how}"
    return None


def _explain_file(error: OSError) -> str | None:
    """Name the file; diffusers and transformers raise OSError without one for a pipeline that is not there."""
    causes = {type(cause).__name__ for cause in _causes(error)}
    for name in REMEDIES:
        if name in causes:
            return f"{shorten(str(error))}\n{REMEDIES[name]}"
    if error.filename is None:
        return shorten(str(error)) if "rror no file named" in str(error) or "config.json" in str(error) else None
    return f"{error.filename}: {error.strerror}. Check the path, its permissions and the space on the disk."


def _causes(error: BaseException) -> Iterator[BaseException]:
    cause = error.__cause__ or error.__context__
    while cause is not None:
        yield cause
        cause = cause.__cause__ or cause.__context__
