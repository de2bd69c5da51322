"""Run every command of README.md and docs/*.md as written, in a fresh clone: `make walk`.

A fenced `bash` block is run, unless its first line is a comment that begins with `# needs`: what it needs is not there.
Blocks of one page run in order, in one clone that all pages share.
"""

import argparse
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
NEEDS = "# needs "
FENCE = re.compile(r"^```bash\n(.*?)^```$", re.MULTILINE | re.DOTALL)


class Block(NamedTuple):
    """A fenced block of shell commands."""

    page: str
    line: int  # of the fence, from 1
    script: str

    @property
    def needs(self) -> str:
        """Why the block is not run; empty for one that is."""
        first = self.script.partition("\n")[0]
        return first.removeprefix(NEEDS) if first.startswith(NEEDS) else ""


def pages(root: Path = ROOT) -> list[Path]:
    """README.md first, then the pages in docs."""
    return [root / "README.md", *sorted((root / "docs").glob("*.md"))]


def blocks(path: Path) -> Iterator[Block]:
    """Yield the shell blocks of a page in order."""
    text = path.read_text(encoding="utf-8")
    for match in FENCE.finditer(text):
        yield Block(path.name, text.count("\n", 0, match.start()) + 1, match[1])


def clone(folder: Path) -> Path:
    """Clone the committed state of this repository, with an environment that imports the clone's package.

    The environment borrows the installed packages of the current one, so that nothing is downloaded.
    """
    target = folder / "lit-align"
    subprocess.run(["git", "clone", "-q", "--no-hardlinks", str(ROOT), str(target)], check=True)
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(target / ".venv")], check=True)
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    packages = target / ".venv/lib" / version / "site-packages"
    borrowed = [path for path in sys.path if path.endswith("site-packages")]
    (packages / "walk.pth").write_text("\n".join([str(target), *borrowed]))
    for name, module in {"lit-align": "lit_align", "tensorboard": "tensorboard.main"}.items():
        program = target / ".venv/bin" / name
        program.write_text(f'#!/bin/sh\nexec "$(dirname "$0")/python" -m {module} "$@"\n')
        program.chmod(0o755)
    for stamp in ("installed", "installed_dev"):  # make then installs nothing
        (target / ".venv" / stamp).touch()
    return target


def run(block: Block, folder: Path) -> tuple[float, subprocess.CompletedProcess[str]]:
    """Run a block as a newcomer would, in the root of the clone with its environment active."""
    environment = os.environ | {"PATH": f"{folder}/.venv/bin:{os.environ['PATH']}", "HF_HUB_OFFLINE": "1"}
    environment.pop("PYTHONPATH", None)
    began = time.monotonic()
    command = ["bash", "-euo", "pipefail", "-c", block.script]
    done = subprocess.run(command, cwd=folder, env=environment, text=True, capture_output=True)
    return time.monotonic() - began, done


def main() -> None:
    """Run or list the blocks, and exit with an error if one failed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--list", action="store_true", help="only list the blocks")
    parser.add_argument("pages", nargs="*", help="names such as README.md; none: all")
    options = parser.parse_args()
    wanted = [path for path in pages() if not options.pages or path.name in options.pages]
    found = [block for path in wanted for block in blocks(path)]
    failed, done_before, began = [], set(), time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        root = None if options.list else clone(Path(folder))
        for block in found:
            where = f"{block.page}:{block.line}"
            if block.needs or root is None:
                print(f"{'not run' if block.needs else 'runs':>8}  {where:32} {block.needs}", flush=True)
                continue
            if block.script in done_before:  # pages repeat the commands of the README
                print(f"{'repeats':>8}  {where:32}", flush=True)
                continue
            done_before.add(block.script)
            seconds, done = run(block, root)
            print(f"{seconds:7.1f}s  {where:32} {'ok' if done.returncode == 0 else 'FAILED'}", flush=True)
            if done.returncode:
                failed.append(where)
                print(block.script, done.stdout[-2000:], done.stderr[-3000:], sep="\n", flush=True)
    skipped = sum(bool(block.needs) for block in found)
    verb = "to run" if options.list else "ran"
    total = f"{len(found) - skipped} blocks {verb}, {skipped} not run, {len(failed)} failed"
    print(f"{total}, {time.monotonic() - began:.0f} s")
    sys.exit(f"failed: {', '.join(failed)}" if failed else 0)


if __name__ == "__main__":
    main()
