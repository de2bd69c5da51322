"""The messages that the page of troubleshooting explains are still those of the code."""

import ast
import re

from tests.support.paths import ROOT

ROW = re.compile(r"^\| (`[^|]+) \|", re.MULTILINE)
FOREIGN = {  # of other programs
    "No module named 'bitsandbytes'",
    "operator torchvision::nms does not exist",
    "CUDA out of memory",
    "No Python 3.11 to 3.13 found",  # the Makefile's
}


def texts():
    """Yield the text of string constants without docstrings; of an f-string the parts in a row."""
    for path in (ROOT / "lit_align").rglob("*.py"):
        tree = ast.parse(path.read_text())
        holders = [node for node in ast.walk(tree) if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef)]
        docstrings = {id(node.body[0].value) for node in holders if ast.get_docstring(node) is not None}
        for node in ast.walk(tree):
            if id(node) in docstrings:
                continue
            if isinstance(node, ast.JoinedStr):
                parts = [part.value if isinstance(part, ast.Constant) else "\0" for part in node.values]
                yield "".join(parts)
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                yield node.value


def test_messages_are_those_of_the_code():
    cells = ROW.findall((ROOT / "docs/troubleshooting.md").read_text())
    messages = [message for cell in cells for message in re.findall(r"`([^`]+)`", cell)]
    assert len(messages) >= 60
    known = "\n".join(texts())
    fragments = {part.strip(" ,") for message in set(messages) - FOREIGN for part in message.split("...")}
    assert sorted(fragment for fragment in fragments if fragment not in known) == []
