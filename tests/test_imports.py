"""Imports point one way: whichever module is imported first, all others are whole when they are needed."""

import ast
from graphlib import TopologicalSorter
from pathlib import Path

import mh_lightning

ROOT = Path(mh_lightning.__file__).parents[1]


def name_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imported(path: Path, modules: set[str]) -> set[str]:
    """Modules that the import of a file runs, with the packages that they are in, but for its own ones."""
    found: set[str] = set()
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    found &= modules
    packages = {name.rpartition(".")[0] for name in found}
    own = {name_of(path).rsplit(".", depth)[0] for depth in range(5)}
    return ((found | packages) & modules) - own - {"mh_lightning"}


def test_no_circle() -> None:
    paths = {name_of(path): path for path in (ROOT / "mh_lightning").rglob("*.py")}
    graph = {name: imported(path, {*paths}) for name, path in paths.items()}
    order = [*TopologicalSorter(graph).static_order()]  # raises CycleError
    assert len(order) == len(paths)
    assert order.index("mh_lightning.layers") < order.index("mh_lightning.methods")
