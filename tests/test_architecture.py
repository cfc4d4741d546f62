"""The rooms and the direction between them (DESIGN): read from the sources, so that a wrong import fails a test."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "dinov2cli"
# Some versions of Python follow the link dinov2cli/kernels -> ../kernels here, some do not.
_LINKED = PACKAGE / "kernels"
FILES = sorted({*PACKAGE.rglob("*.py"), *_LINKED.rglob("*.py")} - set((PACKAGE / "recipes").rglob("*.py")))
# Modules nobody but the owner may import: name → files (or rooms) that may.
OWNED = {
    "accelerate": ("train/parallel.py", "distributed.py"),
    "triton": ("kernels/",),
    "xformers": ("kernels/",),
    "yaml": ("recipe.py",),
    "typer": ("cli/",),
    "rich": ("cli/",),
    "dinov2cli.config": ("cli/", "config/"),
    "dinov2cli.cli": ("cli/", "__main__.py"),
    "torchvision": (),
    "timm": (),
}
# The command line must answer --help without these.
HEAVY = {
    "torch",
    "numpy",
    "pyarrow",
    "datasets",
    "faiss",
    "matplotlib",
    "scipy",
    "sklearn",
    "skimage",
    "PIL",
    "pydantic",
}
LIGHT = ("cli/", "__init__.py", "__main__.py", "errors.py", "artifacts/manifest.py", "artifacts/output.py")
FORBIDDEN = {
    "models": ("train", "cli", "config", "data", "losses", "curation", "evaluation", "report"),
    "kernels": ("train", "cli", "config", "data", "losses", "models", "curation", "evaluation", "report", "search"),
    "losses": ("train", "cli", "config", "data", "models", "curation", "evaluation", "report"),
    "search": ("train", "cli", "config", "artifacts", "data", "models", "curation", "evaluation", "report"),
    "artifacts": ("train", "cli", "config", "data", "models", "search", "curation", "evaluation", "report"),
    "data": ("train", "cli", "config", "models", "losses", "curation", "evaluation", "report"),
    "report": ("train", "cli", "config"),
    "curation": ("train", "cli", "config", "evaluation", "report"),
    "evaluation": ("cli", "config", "report", "fairness"),
    "fairness": ("train", "cli", "config", "report"),
    "train": ("cli", "config", "curation", "evaluation", "report"),
}


def name_of(path: Path) -> str:
    return path.relative_to(PACKAGE).as_posix()


def imports(path: Path, *, top_only: bool = False) -> set[str]:
    """Modules a file imports, `from a import b` as both `a` and `a.b`; type-checking blocks are left out."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    found: set[str] = set()

    def visit(node: ast.AST) -> None:
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            return
        if top_only and isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            return
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module)
            found.update(f"{node.module}.{alias.name}" for alias in node.names)
        for child in ast.iter_child_nodes(node):
            visit(child)

    visit(tree)
    return found


def under(module: str, prefix: str) -> bool:
    return module == prefix or module.startswith(f"{prefix}.")


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_only_owners_import_what_is_owned(path):
    for module, owners in OWNED.items():
        if any(under(found, module) for found in imports(path)):
            assert name_of(path).startswith(owners or ("nobody",)), f"{name_of(path)} imports {module}"


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_rooms_look_down_only(path):
    room = name_of(path).split("/")[0]
    for other in FORBIDDEN.get(room, ()):
        assert not any(under(found, f"dinov2cli.{other}") for found in imports(path)), (
            f"{name_of(path)} imports {other}"
        )


@pytest.mark.parametrize("path", [p for p in FILES if name_of(p).startswith(LIGHT)], ids=name_of)
def test_light_modules_import_nothing_heavy_at_the_top(path):
    heavy = {found for found in imports(path, top_only=True) if found.split(".")[0] in HEAVY}
    assert not heavy


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_files_stay_readable(path):
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 400
    assert path.stem not in ("utils", "helpers", "misc")


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_modules_and_public_functions_are_documented(path):
    tree = ast.parse(path.read_text(encoding="utf-8"))
    assert ast.get_docstring(tree), "module docstring"
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
            assert ast.get_docstring(node), f"{node.name} has no docstring"


def test_no_pickle_is_read():
    """Only torch.load with weights_only=True, and no module that unpickles."""
    for path in FILES:
        text = path.read_text(encoding="utf-8")
        used = {found for found in imports(path) if under(found, "pickle")}
        assert used <= {"pickle", "pickle.UnpicklingError"}, name_of(path)  # the error that torch.load raises
        assert "import pickle" not in text.replace("from pickle import UnpicklingError", ""), name_of(path)
        for call in re.finditer(r"torch\.load\((?:[^()]|\([^()]*\))*\)", text):
            assert "weights_only=True" in call.group(), f"{name_of(path)}: {call.group()}"
        for call in re.finditer(r"np\.load\((?:[^()]|\([^()]*\))*\)", text):
            assert "allow_pickle=True" not in call.group()


def test_only_artifacts_know_the_files_of_artifacts():
    names = ("manifest.json", "kept.parquet", "dropped.parquet", "results.json", "metrics.jsonl")
    for path in FILES:
        if name_of(path).startswith(("artifacts/", "cli/")):
            continue
        tree = ast.parse(path.read_text(encoding="utf-8"))
        docs = {id(n.value) for n in ast.walk(tree) if isinstance(n, ast.Expr)}
        for node in ast.walk(tree):
            if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docs:
                assert node.value not in names, f"{name_of(path)}: {node.value}"


def test_importing_every_light_module_loads_nothing_heavy():
    code = f"import sys, dinov2cli.cli.main; print([m for m in {sorted(HEAVY | {'accelerate'})} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
