"""Imports point one way, and only some rooms know Lightning."""

import ast

from tests.conftest import ROOT

ALLOWED = {
    "types": set(),
    "files": set(),
    "checkpoints": {"files", "backbones"},
    "objectives": {"types"},
    "diffusion": {"types"},
    "metrics": {"types"},
    "resume": set(),
    "non_finite": set(),
    "steps": set(),
    "fsdp2": {"backbones"},
    "backbones": {"types", "diffusion"},
    "scoring": set(),
    "data": {"types", "files", "scoring"},
    "module": {"types", "objectives", "diffusion", "backbones", "metrics", "non_finite", "resume", "steps", "fsdp2"},
    "memory": {"backbones", "module"},
    "evaluation": {"types", "files", "backbones", "data", "scoring"},
    "callbacks": {
        "types",
        "checkpoints",
        "files",
        "objectives",
        "diffusion",
        "backbones",
        "metrics",
        "module",
        "steps",
        "data",
        "scoring",
        "evaluation",
        "memory",
        "fsdp2",
    },
    "commands": {
        "types",
        "files",
        "objectives",
        "diffusion",
        "backbones",
        "metrics",
        "module",
        "steps",
        "data",
        "callbacks",
        "scoring",
        "evaluation",
        "memory",
        "fsdp2",
    },
    "config_rules": {"checkpoints"},
    "cli": {
        "types",
        "checkpoints",
        "config_rules",
        "fsdp2",
        "objectives",
        "backbones",
        "module",
        "data",
        "callbacks",
        "commands",
    },
    "__main__": {"cli"},
    "__init__": set(),
}
KNOW_LIGHTNING = {
    "steps",
    "checkpoints",
    "fsdp2",
    "module",
    "data",
    "callbacks",
    "cli",
    "commands",
}  # the last one its Fabric, and doctor its Trainer
TORCH_ONLY = {"types", "objectives", "diffusion"}


def imported(path):
    """Full names of all modules that a file imports, anywhere in it."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            yield node.module
            if node.module == "lit_align":
                yield from (f"lit_align.{alias.name}" for alias in node.names)


def test_imports_point_one_way():
    package = ROOT / "lit_align"
    files = sorted(package.rglob("*.py"))
    assert len(files) == 141
    for path in files:
        room = path.relative_to(package).parts[0].removesuffix(".py")
        for name in imported(path):
            top, *rest = name.split(".")
            if top == "lit_align" and rest and rest[0] not in ("__version__", room):
                assert rest[0] in ALLOWED[room], f"{path} imports {name}"
            if top in ("lightning", "pytorch_lightning"):
                assert room in KNOW_LIGHTNING, f"{path} imports {name}"
            if room in TORCH_ONLY:
                assert top in ("torch", "lit_align", "typing", "abc", "collections"), f"{path} imports {name}"
