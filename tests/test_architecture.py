"""The shape of the code: data flows one way, names are explicit, modules stay small."""

import ast
import pathlib
import shutil
import subprocess

import pytest

ROOT = pathlib.Path(__file__).parents[1]

# A module imports only from lines above its own, and from its own.
ORDER = (
    "storage",
    "trees",
    "types",
    "truncation",
    "sampling",
    "caches",
    "native",
    "models",
    "checkpoints",
    "verification",
    "decoding",
    "drafters",
    "training",
    "analysis",
    "testing",
)
# Besides the order: what meets at `types` does not know each other.
FORBIDDEN = {"verification": {"models", "drafters"}, "decoding": {"models", "drafters"}}
NNX_USERS = {"models", "training"}
VAGUE_NAMES = {"utils", "util", "misc", "helpers", "helper", "common"}
TOP_LEVEL = {
    "BUILD.md",
    "LICENSE",
    "README.md",
    "experiments",
    "notebooks",
    "pyproject.toml",
    "specjax",
    "tests",
}
LONGEST_MODULE = 420

MODULES = sorted((ROOT / "specjax").rglob("*.py"))
OTHERS = [path for folder in ("tests", "experiments") for path in (ROOT / folder).rglob("*.py")]


def dotted(path: pathlib.Path) -> str:
    """The name under which a file is imported."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(source: str, module: str, is_package: bool = False) -> set[str]:
    """Dotted names that a module imports, wherever it does; relative ones resolved."""
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            origin = node.module or ""
            if node.level:
                kept = len(module.split(".")) - node.level + is_package
                origin = ".".join([*module.split(".")[:kept], *([origin] if origin else [])])
            names |= {f"{origin}.{alias.name}" for alias in node.names}
    return names


def import_faults(source: str, module: str, is_package: bool = False) -> list[str]:
    """Breaches of the one-way flow by a module below specjax; the root package may import all."""
    line = module.split(".")[1] if "." in module else None
    if line is not None and line not in ORDER:
        return [f"{module}: {line!r} has no place in the order"]
    faults = []
    for name in sorted(imports(source, module, is_package)):
        parts = name.split(".")
        if name.startswith("flax.nnx") and line not in NNX_USERS:
            faults.append(f"{module} imports {name}")
        if parts[0] != "specjax" or line is None:
            continue
        imported = parts[1] if len(parts) > 1 else None
        if imported not in ORDER:
            faults.append(f"{module} imports {name}, not a module in the order")
        elif ORDER.index(imported) > ORDER.index(line) or imported in FORBIDDEN.get(line, ()):
            faults.append(f"{module} imports {name}")
    return faults


def exported(tree: ast.Module) -> set[str] | None:
    """Names listed in `__all__`, or None where there is none."""
    for node in tree.body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
            return set(ast.literal_eval(node.value))
    return None


def name_faults(source: str, module: str) -> list[str]:
    """Public functions and classes that `__all__` does not list, and names it lists in vain."""
    tree = ast.parse(source)
    public, bound = set(), set()
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            bound.add(node.name)
            if not node.name.startswith("_"):
                public.add(node.name)
        elif isinstance(node, ast.Import | ast.ImportFrom):
            bound |= {alias.asname or alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            bound |= {ast.unparse(target) for target in targets}
    listed = exported(tree)
    if listed is None:
        return [f"{module} has no __all__"] if public else []
    faults = [f"{module}: {name} is not in __all__" for name in sorted(public - listed)]
    return faults + [f"{module}: __all__ lists {name}, unknown" for name in sorted(listed - bound)]


def package_faults(source: str, module: str) -> list[str]:
    """Whatever an `__init__.py` holds besides a docstring, imports and `__all__`."""
    first, *others = ast.parse(source).body
    faults = [] if isinstance(first, ast.Expr) else [f"{module} has no docstring"]
    for node in others:
        is_names = isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__"
        if not (is_names or isinstance(node, ast.Import | ast.ImportFrom)):
            faults.append(f"{module} holds {ast.unparse(node).splitlines()[0]!r}")
    return faults


@pytest.mark.parametrize("path", MODULES, ids=dotted)
def test_module(path):
    source, module = path.read_text(), dotted(path)
    is_package = path.name == "__init__.py"
    faults = import_faults(source, module, is_package) + name_faults(source, module)
    if is_package:
        faults += package_faults(source, module)
    if path.stem in VAGUE_NAMES:
        faults.append(f"{module}: the name says nothing")
    assert not faults, "\n".join(faults)


def test_no_file_is_long():
    lines = {dotted(path): len(path.read_text().splitlines()) for path in [*MODULES, *OTHERS]}
    assert not {name: count for name, count in lines.items() if count > LONGEST_MODULE}


def test_top_level_holds_nothing_else():
    if shutil.which("git") is None or not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    if listed.returncode:
        pytest.skip(f"git: {listed.stderr.strip()}")
    top = {line.split("/")[0].strip('"') for line in listed.stdout.splitlines()}
    assert {name for name in top if not name.startswith(".")} <= TOP_LEVEL


@pytest.mark.parametrize(
    "module, source",
    [
        ("specjax.trees", "from specjax import types"),
        ("specjax.trees", "import specjax.types"),
        ("specjax.caches", "from specjax.models.config import TransformerConfig"),
        ("specjax.models.tabular", "def f():\n    from specjax import decoding"),
        ("specjax.verification.token", "from specjax import models"),
        ("specjax.decoding.plain", "from specjax.drafters import model"),
        ("specjax.decoding.plain", "from ..drafters import model"),
        ("specjax.decoding.plain", "from .. import drafters"),
        ("specjax.verification.token", "import specjax"),
        ("specjax.drafters.medusa", "from flax import nnx"),
        ("specjax.drafters.medusa", "import flax.nnx as layers"),
        ("specjax.drafters.medusa", "from flax.nnx import Linear"),
        ("specjax.serving.loop", "import jax"),
    ],
)
def test_a_planted_import_is_found(module, source):
    assert import_faults(source, module)


@pytest.mark.parametrize(
    "module, source",
    [
        ("specjax.types", "from specjax import trees"),
        ("specjax.models.transformer", "from flax import nnx\nfrom specjax.models import rotary"),
        ("specjax.drafters.model", "from specjax import sampling, trees, types"),
        ("specjax.decoding.plain", "from . import state"),
        ("specjax", "from specjax import testing"),
    ],
)
def test_a_lawful_import_is_not(module, source):
    assert not import_faults(source, module, is_package=module == "specjax")


@pytest.mark.parametrize(
    "source",
    [
        "def f(): ...",
        "__all__ = []\nclass C: ...",
        "__all__ = ['f', 'g']\ndef f(): ...",
        "__all__ = ['f']\ndef f(): ...\nasync def g(): ...",
    ],
)
def test_a_planted_name_is_found(source):
    assert name_faults(source, "specjax.trees")


@pytest.mark.parametrize(
    "source",
    ["import jax", '"""Doc."""\nx = 1', '"""Doc."""\ndef f(): ...', '"""Doc."""\nif True: pass'],
)
def test_logic_planted_in_a_package_is_found(source):
    assert package_faults(source, "specjax")


def test_names_and_packages_in_order_pass():
    source = '"""Doc."""\n\nfrom specjax import trees\n\n__all__ = ["trees"]\n'
    assert not name_faults(source, "specjax")
    assert not package_faults(source, "specjax")
    assert not name_faults("__all__ = ['f']\ndef f(): ...\ndef _g(): ...", "specjax.trees")
