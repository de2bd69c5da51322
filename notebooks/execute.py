"""Execute notebooks from top to bottom and store them with their outputs.

python notebooks/execute.py                           # all three, in place
python notebooks/execute.py notebooks/03_votes.ipynb
"""

import argparse
import base64
import io
import os
import re
from collections.abc import Mapping
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbformat import NotebookNode
from PIL import Image
from tqdm import tqdm

FOLDER = Path(__file__).parent
TIMEOUT = 900  # seconds a cell may take


def execute(path: Path, parameters: Mapping[str, int] | None = None) -> NotebookNode:
    """The notebook at `path` with new outputs; the file stays as it is.

    Args:
        path: of the notebook.
        parameters: numbers in the place of those that its cell tagged `parameters` sets.

    Raises:
        ValueError: if that cell sets no number of such a name.
        nbclient.exceptions.CellExecutionError: if a cell fails.
    """
    notebook = nbformat.read(path, as_version=4)
    for name, value in (parameters or {}).items():
        _replace(notebook, path, name, value)
    where = {"metadata": {"path": str(path.parent)}}  # notebooks look for the project above their own folder
    client = NotebookClient(
        notebook, kernel_name="python3", timeout=TIMEOUT, startup_timeout=TIMEOUT, resources=where, record_timing=False
    )
    executed = client.execute()
    for output in (output for cell in executed.cells for output in cell.get("outputs", [])):
        _compress(output.get("data", {}))
    executed.metadata.language_info = NotebookNode(name="python")  # the kernel adds the version it happened to have
    return executed


def _replace(notebook: NotebookNode, path: Path, name: str, value: int) -> None:
    for cell in notebook.cells:
        if "parameters" in cell.metadata.get("tags", []):
            cell.source, found = re.subn(rf"(?m)^{name} = \d+", f"{name} = {value}", cell.source)
            if found:
                return
    raise ValueError(f"{path} has no cell tagged 'parameters' that sets {name!r} to a whole number.")


def _compress(data: NotebookNode) -> None:
    """Store a picture once, as a PNG of 256 colours: a third of its size."""
    data.pop("image/jpeg", None)  # which PIL's images bring beside their PNG
    if "image/png" in data:
        picture = Image.open(io.BytesIO(base64.b64decode(data["image/png"]))).convert("RGB")
        file = io.BytesIO()
        picture.quantize(256, Image.Quantize.MAXCOVERAGE, dither=Image.Dither.NONE).save(file, "PNG", optimize=True)
        data["image/png"] = base64.b64encode(file.getvalue()).decode()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("notebooks", type=Path, nargs="*", help="files; none: all beside this one")
    paths = parser.parse_args().notebooks or sorted(FOLDER.glob("*.ipynb"))
    for path in tqdm(paths, desc="notebooks", unit="notebook"):
        executed = execute(path)
        part = path.with_suffix(".part")
        nbformat.write(executed, part)
        os.replace(part, path)


if __name__ == "__main__":
    main()
