"""Print the measures of the code's structure: structure.py PACKAGE [TESTS].

Lines are those of the file; the length of a function is without its docstring.
"""

import ast
import sys
from collections.abc import Iterator
from pathlib import Path
from statistics import median, quantiles


def lines(path: Path) -> int:
    """Count the lines of a file."""
    return len(path.read_text(encoding="utf-8").splitlines())


def function_lengths(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Yield (lines without the docstring, name) of each function and method."""
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            first = node.body[0]
            documented = ast.get_docstring(node) is not None
            docstring = first.end_lineno - first.lineno + 1 if documented else 0
            yield node.end_lineno - node.lineno + 1 - docstring, node.name


def imports(tree: ast.AST, known: set[str]) -> set[str]:
    """Modules of the package that a file imports at its top level, under TYPE_CHECKING too; not inside functions."""
    found = set()
    todo = list(ast.iter_child_nodes(tree))
    while todo:
        node = todo.pop()
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            continue
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= {name if name in known else node.module for name in names}
        todo += ast.iter_child_nodes(node)
    return found & known


def cycles(graph: dict[str, set[str]]) -> list[list[str]]:
    """Groups of modules that import each other in a circle (strongly connected components, by Tarjan)."""
    index: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    found: list[list[str]] = []

    def visit(name: str) -> None:
        index[name] = low[name] = len(index)
        stack.append(name)
        for other in sorted(graph[name]):
            if other not in index:
                visit(other)
                low[name] = min(low[name], low[other])
            elif other in stack:
                low[name] = min(low[name], index[other])
        if low[name] == index[name]:
            group = stack[stack.index(name) :]
            del stack[stack.index(name) :]
            if len(group) > 1:
                found.append(sorted(group))

    for name in sorted(graph):
        if name not in index:
            visit(name)
    return found


def measure(values: list[tuple[int, str]]) -> str:
    """Median, ninth decile and the largest with its name."""
    sizes = [size for size, _ in values]
    ninth = quantiles(sizes, n=10, method="inclusive")[-1] if len(sizes) > 1 else sizes[0]
    largest, name = max(values)
    return f"{median(sizes):.0f} / {ninth:.0f} / {largest} ({name})"


def main(package: str, tests: str | None = None) -> None:
    """Print all measures."""
    root = Path(package)
    trees = {path: ast.parse(path.read_text(encoding="utf-8")) for path in sorted(root.rglob("*.py"))}
    names = {".".join(path.with_suffix("").parts).removesuffix(".__init__"): path for path in trees}
    known = set(names)
    files = [(lines(path), str(path)) for path in trees]
    total = sum(size for size, _ in files)
    print(f"files                                {len(files)}, {total:,} lines")
    print(f"median / ninth decile / largest file {measure(files)}")
    functions = [(size, f"{path}:{name}") for path, tree in trees.items() for size, name in function_lengths(tree)]
    print(f"functions                            {len(functions)}")
    print(f"median / ninth decile / longest      {measure(functions)}")
    found = cycles({name: imports(trees[path], known) - {name} for name, path in names.items()})
    print(f"import cycles                        {len(found)}" + "".join(f"\n  {' '.join(group)}" for group in found))
    if tests is not None:
        tested = sum(lines(path) for path in Path(tests).rglob("*.py"))
        print(f"tests to source, lines               {tested:,} / {total:,} = {tested / total:.2f}")


if __name__ == "__main__":
    main(*sys.argv[1:])
