"""How the package is built: circles, late imports, sizes, and what `fit` enters.

    python bench/structure.py [--fit | --map]

Every import counts as an edge: at the top of a file, in a function, under TYPE_CHECKING.
"""

import argparse
import ast
import json
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parent.parent
PACKAGE = "twophase_ext"
# Imported where they are used: heavy, or not of every installation.
OPTIONAL = {"lightning", "transformers", "cupy", "matplotlib", "mpi4py", "torch._inductor"}


def modules() -> dict[str, Path]:
    """Dotted name and file of every module."""
    found = {}
    for path in sorted((ROOT / PACKAGE).rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imports(name: str, path: Path, known: set[str]) -> Iterator[tuple[str, bool]]:
    """(module of the package, whether late: in a function or for types alone) of each import."""
    tree = ast.parse(path.read_text())
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    top = {id(node) for node in tree.body}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            targets = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package.split(".")
            base = base[: len(base) - node.level + 1] if node.level else []
            prefix = ".".join([*base, node.module] if node.module else base)
            targets = [
                full if (full := f"{prefix}.{alias.name}") in known else prefix
                for alias in node.names
            ]
        else:
            continue
        for target in dict.fromkeys(targets):
            if target in known and target != name:
                yield target, id(node) not in top


def circles(edges: dict[str, set[str]]) -> list[list[str]]:
    """Modules that import each other, however far around (Tarjan's components of two and more)."""
    index: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    found: list[list[str]] = []

    def visit(v: str) -> None:
        index[v] = low[v] = len(index)
        stack.append(v)
        for w in edges[v]:
            if w not in index:
                visit(w)
                low[v] = min(low[v], low[w])
            elif w in stack:
                low[v] = min(low[v], index[w])
        if low[v] == index[v]:
            component = stack[stack.index(v) :]
            del stack[stack.index(v) :]
            if len(component) > 1:
                found.append(sorted(component))

    for v in edges:
        if v not in index:
            visit(v)
    return sorted(found, key=len, reverse=True)


def widest_class(paths: dict[str, Path]) -> tuple[str, int]:
    """The class with most attributes of its own: `self.x = ...`, and fields."""
    best = ("", 0)
    for name, path in paths.items():
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.ClassDef):
                continue
            own = {
                t.attr
                for sub in ast.walk(node)
                if isinstance(sub, ast.Attribute) and isinstance(sub.ctx, ast.Store)
                for t in [sub]
                if isinstance(t.value, ast.Name) and t.value.id == "self"
            }
            own |= {
                sub.target.id
                for sub in node.body
                if isinstance(sub, ast.AnnAssign) and isinstance(sub.target, ast.Name)
            }
            if len(own) > best[1]:
                best = (f"{name}.{node.name}", len(own))
    return best


def entered() -> dict[str, int]:
    """Files and functions of the package that `fit` enters up to its result, gd and separation."""
    import torch

    import twophase_ext as tp

    torch.manual_seed(0)
    x, y = torch.randn(40, 5), torch.randint(3, (40,))
    model = torch.nn.Sequential(torch.nn.Linear(5, 48), tp.nn.Softplus(), torch.nn.Linear(48, 3))
    trainer = tp.Trainer(model, epochs=4, tau=2, second_phase="gd", run_dir=False, progress=False)
    seen: set[tuple[str, str]] = set()

    def note(frame, event, argument):
        if event == "call" and f"/{PACKAGE}/" in frame.f_code.co_filename:
            seen.add((frame.f_code.co_filename, frame.f_code.co_qualname))

    sys.setprofile(note)
    try:
        trainer.fit((x, y))
    finally:
        sys.setprofile(None)
    return {"files": len({file for file, _ in seen}), "functions": len(seen)}


def sentence(path: Path) -> str:
    """The first sentence of a module's docstring, on one line."""
    paragraph = (ast.get_docstring(ast.parse(path.read_text())) or "").split("\n\n")[0]
    text = " ".join(paragraph.split())
    return text.split(". ")[0].rstrip(".")


def map_of_the_tree() -> str:
    """Markdown: every folder of the package, its files, and what each is for."""
    lines = []
    for folder in sorted({path.parent for path in modules().values()}):
        own = sentence(folder / "__init__.py")
        lines += ["", f"**{folder.relative_to(ROOT)}/**: {own}.", ""]
        lines += [
            f"- `{path.name}`: {sentence(path)}"
            for path in sorted(folder.glob("*.py"))
            if path.name != "__init__.py"
        ]
    return "\n".join(lines).strip() + "\n"


def main() -> None:
    """Print the numbers as JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--fit", action="store_true", help="count what a small fit enters")
    parser.add_argument("--map", action="store_true", help="the map of docs/architecture.md")
    arguments = parser.parse_args()
    if arguments.map:
        print(map_of_the_tree(), end="")
        return
    paths = modules()
    known = set(paths)
    found = {name: list(imports(name, path, known)) for name, path in paths.items()}
    edges = {name: {target for target, _ in targets} for name, targets in found.items()}
    round_trips = circles(edges)
    late = [f"{name} -> {t}" for name, targets in found.items() for t, late in targets if late]
    name, count = widest_class(paths)
    numbers = {
        "files": len(paths),
        "lines": sum(len(path.read_text().splitlines()) for path in paths.values()),
        "edges": sum(map(len, edges.values())),
        "largest circle": len(round_trips[0]) if round_trips else 0,
        "circles": round_trips,
        "late imports": late,
        "widest class": f"{name}: {count} attributes",
    }
    if arguments.fit:
        numbers["entered by fit"] = entered()
    print(json.dumps(numbers, indent=2))


if __name__ == "__main__":
    main()
