"""Calls that run code of their input, or fetch or unpack it unchecked, found in a syntax tree."""

import ast

# Names that no file may use, whatever the arguments.
BANNED = {
    *("eval", "exec", "__import__", "os.system", "os.popen", "tempfile.mktemp"),
    *("yaml.load", "yaml.load_all", "yaml.full_load", "yaml.unsafe_load", "yaml.FullLoader"),
    *("yaml.Loader", "yaml.UnsafeLoader", "torch.hub.load", "torch.jit.load", "markupsafe.Markup"),
    *("subprocess.getoutput", "subprocess.getstatusoutput", "shutil.unpack_archive"),
    *("urllib.request.urlopen", "urllib.request.urlretrieve", "requests.get", "requests.post"),
}
MODULES = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "marshal", "shelve"}
# Calls that need an argument of this value; None: any value but None.
REQUIRED = {
    "torch.load": ("weights_only", True),
    "numpy.load": ("allow_pickle", False),
    "jinja2.Environment": ("autoescape", True),
    "pooch.retrieve": ("known_hash", None),
}
UNPACK = {"extract", "extractall"}  # methods of archives: a member's name leads anywhere


def dotted(node: ast.AST, names: dict[str, str]) -> str | None:
    """numpy.load for np.load under `import numpy as np`; None for what is no dotted name."""
    if isinstance(node, ast.Name):
        return names.get(node.id, node.id)
    if isinstance(node, ast.Attribute):
        base = dotted(node.value, names)
        return None if base is None else f"{base}.{node.attr}"
    return None


def imported(tree: ast.AST) -> dict[str, str]:
    """Local name -> what it stands for."""
    names = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {a.asname: a.name for a in node.names if a.asname}
        if isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names |= {a.asname or a.name: f"{node.module}.{a.name}" for a in node.names}
    return names


def offences(source: str) -> list[tuple[int, str]]:
    """(line, what) of everything that is not allowed in a file."""
    tree = ast.parse(source)
    names, found, good = imported(tree), [], set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            modules = [a.name for a in node.names]
            modules = [node.module or ""] if isinstance(node, ast.ImportFrom) else modules
            found += [(node.lineno, m) for m in modules if m.split(".")[0] in MODULES]
        if not isinstance(node, ast.Call):
            continue
        name = dotted(node.func, names) or ""
        given = {k.arg: k.value for k in node.keywords}
        if name in REQUIRED:
            key, wanted = REQUIRED[name]
            value = given.get(key)
            constant = value.value if isinstance(value, ast.Constant) else ...
            if value is not None and (
                constant is not None if wanted is None else constant is wanted
            ):
                good.add(node.func)
        if name == "compile":  # elsewhere a name like any other
            found.append((node.lineno, name))
        if name == "importlib.import_module" and not isinstance(node.args[0], ast.Constant):
            found.append((node.lineno, name))
        shell = given.get("shell")
        if shell is not None and not (isinstance(shell, ast.Constant) and shell.value is False):
            found.append((node.lineno, "shell="))
        if isinstance(node.func, ast.Attribute) and node.func.attr in UNPACK:
            found.append((node.lineno, f".{node.func.attr}"))
    for node in ast.walk(tree):
        if isinstance(node, ast.Name | ast.Attribute) and node not in good:
            name = dotted(node, names)
            if name in BANNED or name in REQUIRED:
                found.append((node.lineno, name))
    return sorted(set(found))
