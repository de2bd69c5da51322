"""Imports point one way, only some rooms import Lightning, and tests have the rooms of the package."""

import ast
from collections import Counter

from tests.support.paths import ROOT

BELOW = {"types", "user_errors", "common"}
MODELS = BELOW | {"objectives", "diffusion", "backbones"}
TRAINING = MODELS | {"data", "internals", "scoring", "training"}
ALLOWED = {
    "types": set(),
    "user_errors": set(),
    "common": {"types", "user_errors"},
    "moved": set(),
    "internals": set(),
    "objectives": {"types", "user_errors"},
    "diffusion": {"types", "user_errors"},
    "backbones": BELOW | {"diffusion"},
    "scoring": BELOW,
    "data": BELOW | {"internals", "scoring"},
    "training": MODELS | {"internals"},  # not data: the module and the data module meet in the batch
    "memory": MODELS | {"internals", "training"},
    "evaluation": BELOW | {"backbones", "data", "scoring"},
    "callbacks": TRAINING | {"memory", "evaluation"},
    "commands": TRAINING | {"memory", "evaluation", "callbacks"},
    "cli": {"commands", "user_errors"},
    "__main__": {"cli", "commands"},
    "__init__": {"moved"},
}
KNOW_LIGHTNING = {"internals", "training", "data", "callbacks", "commands", "cli"}
TORCH_ONLY = {"types", "user_errors", "objectives", "diffusion"}
SHARED_STEMS = {"__init__", "base", "command"}


def imported(path):
    """Yield the full names of the modules that a file imports, anywhere in it."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            yield node.module
            if node.module == "lit_align":
                yield from (f"lit_align.{alias.name}" for alias in node.names)


def package_files():
    files = sorted((ROOT / "lit_align").rglob("*.py"))
    assert len(files) > 100, "the walk has missed the package"
    return files


def test_imports_point_one_way():
    seen = set()
    for path in package_files():
        room = path.relative_to(ROOT / "lit_align").parts[0].removesuffix(".py")
        seen.add(room)
        for name in imported(path):
            top, *rest = name.split(".")
            if top == "lit_align" and rest and rest[0] not in ("__version__", room):
                assert rest[0] in ALLOWED[room], f"{path} imports {name}"
            if top in ("lightning", "pytorch_lightning"):
                assert room in KNOW_LIGHTNING, f"{path} imports {name}"
            if room in TORCH_ONLY:
                assert top in ("torch", "lit_align", "typing", "abc", "collections"), f"{path} imports {name}"
    assert seen == ALLOWED.keys()


def test_no_two_files_share_a_name():
    stems = Counter(path.stem for path in package_files())
    assert [stem for stem, count in stems.items() if count > 1 and stem not in SHARED_STEMS] == []


def test_no_test_file_imports_another():
    """Helpers of several files stand in tests/support; folders of tests have the names of the package's rooms."""
    files = sorted((ROOT / "tests").rglob("test_*.py"))
    assert len(files) > 40, "the walk has missed the tests"
    for path in files:
        room = path.relative_to(ROOT / "tests").parts[0].removeprefix("test_").removesuffix(".py")
        assert room in {*ALLOWED, "docs", "repository"}, f"{path} is in no room"
        for name in imported(path):
            assert not name.startswith("tests.") or name.startswith("tests.support."), f"{path} imports {name}"
