"""The help of each command, read from the sources: torch takes seconds to import."""

import ast
import re
import textwrap
from importlib.util import find_spec
from pathlib import Path

from .commands import SUMMARIES

COLUMNS = 100
# where each command is, and where the classes are whose arguments it passes on
SOURCES = {
    "demo": "runs.py",
    "train": "runs.py",
    "verify": "verification.py",
    "doctor": "cli.py",
    "report": "cli.py",
    "reproduce": "cli.py",
    "download": "cli.py",
}
TRAINER = ("twophase_ext", "training/trainer.py", "Trainer")
# Python objects, which no command line gives
HIDDEN = ("self", "callbacks", "last_layer", "augment", "metrics")
POSITIONAL = {"report": ("runs",), "download": ("datasets",), "reproduce": ("what",)}
GROUPS = {
    "Data": ("data_name", "x", "y", "x_test", "y_test", "n"),
    "Model": ("model", "width", "ratio", "weights", "run", "seed", "loss"),
    "The base algorithm": (
        *("epochs", "batch_size", "lr", "momentum", "weight_decay", "optimizer", "scheduler"),
        *("scheduler_interval", "accumulate", "precision", "compile", "device"),
    ),
    "tau and the second phase": (
        *("tau", "noise_std", "noise_seed", "second_phase", "gd", "agd", "exact", "sgd", "lazy"),
        *("batch_norm", "feature_cache", "augment_copies"),
    ),
    "The proof": ("verify", "w", "method", "factorization", "recheck"),
    "The run and its files": (
        *("run_dir", "out", "folder", "resume", "checkpoint_every", "logger", "progress"),
    ),
}
OTHERS = "Options"
LAST = """
  -h, --help
        show this and exit
  --config CONFIG
        a YAML file with these options
  --print_config
        print these options as such a file, and exit"""
NESTED = """
Settings of settings: --gd.steps 50, --agd.early_stopping 5, --optimizer AdamW --optimizer.lr 1e-3;
--gd.help, --optimizer.help AdamW list them."""


def help_of(command: str) -> str:
    """What `twophase COMMAND --help` prints, options in groups."""
    options = options_of(command)
    positional = POSITIONAL.get(command, ())
    usage = " ".join([f"twophase {command}", *(name.upper() for name in positional), "[options]"])
    parts = [f"usage: {usage}", "", *textwrap.wrap(SUMMARIES[command], COLUMNS)]
    placed = {name for names in GROUPS.values() for name in names}
    rest = tuple(name for name in options if name not in (*placed, *positional))
    for title, names in (("Arguments", positional), *GROUPS.items(), (OTHERS, rest)):
        entries = [
            _entry(name, options[name], name in positional) for name in names if name in options
        ]
        if entries:
            parts += ["", f"{title}:", *entries]
    parts += ["", "This command:" + LAST, *([NESTED] if command == "train" else [])]
    return "\n".join(parts)


def options_of(command: str) -> dict[str, tuple[str, str, str]]:
    """{option: (its type, its default, what it is)}, without those that only Python has."""
    path = Path(__file__).parent / SOURCES[command]
    found = _arguments(_find(path, command))
    if command == "train":
        package = find_spec(TRAINER[0])
        folder = Path(str((package.submodule_search_locations or [""])[0] if package else ""))
        owner = _find(folder / TRAINER[1], TRAINER[2])
        found = {**_arguments(owner), **found}
    return {name: option for name, option in found.items() if name not in HIDDEN}


def _find(path: Path, name: str) -> ast.FunctionDef | ast.ClassDef:
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and node.name == name:
            return node
    raise LookupError(f"{path} has no {name}")


def _arguments(node: ast.FunctionDef | ast.ClassDef) -> dict[str, tuple[str, str, str]]:
    """Of a function, or of a class whose docstring has those of its __init__."""
    function = node
    if isinstance(node, ast.ClassDef):
        function = next(n for n in node.body if getattr(n, "name", "") == "__init__")
    told = _told(ast.get_docstring(node) or "")
    args = function.args  # type: ignore[union-attr]
    plain = args.args
    missing = [None] * (len(plain) - len(args.defaults))
    pairs = [*zip(plain, [*missing, *args.defaults], strict=True)]
    pairs += zip(args.kwonlyargs, args.kw_defaults, strict=True)
    return {
        arg.arg: (
            "" if arg.annotation is None else ast.unparse(arg.annotation),
            "" if default is None else ast.unparse(default),
            told.get(arg.arg, ""),
        )
        for arg, default in pairs
    }


def _told(docstring: str) -> dict[str, str]:
    """The entries under "Args:"."""
    found: dict[str, str] = {}
    name = ""
    for line in docstring.partition("Args:\n")[2].splitlines():
        if not line.strip():
            break
        word, colon, rest = line.strip().partition(": ")
        if colon and line.startswith("    ") and not line.startswith("     "):
            name, found[word] = word, rest
        else:
            found[name] += f" {line.strip()}"
    return found


def _entry(name: str, option: tuple[str, str, str], positional: bool) -> str:
    kind, default, told = option
    given = re.fullmatch(r"Literal\[(.*)\]( \| None)?", kind)
    choices = ast.literal_eval(f"({given[1]},)") if given else None
    value = "{" + ",".join(map(str, choices)) + "}" if choices else name.upper()
    head = f"  {name.upper()}" if positional else f"  --{name} {value}"
    shown = "" if default in ("", "None") else f" (default: {default.strip(chr(39))})"
    indent = " " * 8
    text = textwrap.wrap(told + shown, COLUMNS, initial_indent=indent, subsequent_indent=indent)
    return "\n".join([head, *text])
