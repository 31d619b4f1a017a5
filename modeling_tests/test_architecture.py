# SPDX-License-Identifier: Apache-2.0
"""The layers of the package: who may import whom, and which package owns which third-party import."""

import ast
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import llm2clip_hf


ROOT = Path(llm2clip_hf.__file__).parent
# Lower layers first; a module imports lower layers only, and within its own layer what ALLOWED says.
LAYERS = {
    "version": 0,
    "modeling": 0,
    "ops": 0,
    "distributed": 0,
    "files": 0,
    "evaluation.metrics": 0,
    "losses": 1,
    "data": 1,
    "evaluation": 2,
    "hub": 2,
    "training": 2,
    "demo": 3,
    "cli": 4,
    "auto_registration": 1,
    "__init__": 4,
    "__main__": 5,
}
ALLOWED = {("training", "evaluation"), ("training", "hub"), ("hub", "evaluation")}
OWNERS = {
    "triton": ("ops.contrastive_triton",),
    "accelerate": ("training",),
    "peft": ("training",),
    "sentence_transformers": ("training", "evaluation.caption_retrieval", "modeling.sentence_llm2clip"),
    "datasets": ("data",),
    "pyarrow": ("data",),
    "PIL": ("data", "demo"),
    "sklearn": ("demo", "evaluation"),
    "mteb": ("evaluation.mteb_wrapper",),
    "matplotlib": ("demo", "evaluation"),
    "gradio": ("demo.app",),
}
REMOTE_CODE_MAY_IMPORT = {"torch", "transformers", "huggingface_hub"}
# A file that only a user of that package asks for: beside the model, not part of it.
REMOTE_EXTRAS = {"sentence_llm2clip.py": {"sentence_transformers"}}


def modules() -> Iterator[tuple[str, ast.Module]]:
    for path in sorted(ROOT.rglob("*.py")):
        name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
        yield name, ast.parse(path.read_text())


def imports(name: str, tree: ast.AST) -> Iterator[str]:
    """Absolute names of all modules that a module imports, anywhere in it."""
    package = ["llm2clip_hf", *name.split(".")][:-1]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            # `from package import name`: the name may be a module of its own.
            yield from (f"{module}.{alias.name}" for alias in node.names)


def unit(name: str) -> str:
    """The key of LAYERS that a first-party module belongs to."""
    if name.startswith("evaluation.metrics"):
        return "evaluation.metrics"
    return name.split(".")[0]


def test_layers_import_only_lower_layers() -> None:
    wrong = []
    for name, tree in modules():
        own = unit(name)
        for imported in imports(name, tree):
            if not imported.startswith("llm2clip_hf."):
                continue
            other = unit(imported.removeprefix("llm2clip_hf."))
            if other not in LAYERS or other == own or (own, other) in ALLOWED:
                continue  # a name of the root package itself, or the same unit
            if LAYERS[other] >= LAYERS[own]:
                wrong.append(f"{name} imports {imported}")
    assert not wrong, wrong


def test_every_module_has_a_layer() -> None:
    assert {unit(name) for name, _ in modules()} <= LAYERS.keys()


def test_root_imports_the_model_only() -> None:
    tree = ast.parse((ROOT / "__init__.py").read_text())
    first_party = {unit(i.removeprefix("llm2clip_hf.")) for i in imports("__init__", tree) if "llm2clip_hf" in i}
    assert first_party == {"auto_registration", "modeling", "version"}


def loaded_with(name: str, tree: ast.Module, known: set[str]) -> set[str]:
    """The first-party modules that are loaded when a module is: those that its top level imports."""
    wanted: set[str] = set()
    pending: list[ast.stmt] = list(tree.body)
    while pending:
        node = pending.pop()
        if isinstance(node, ast.Import | ast.ImportFrom):
            for imported in imports(name, node):
                path = imported.removeprefix("llm2clip_hf.")
                # `from .module import name` gives `module.name`.
                places = (path, f"{path}.__init__", path.rpartition(".")[0], f"{path.rpartition('.')[0]}.__init__")
                wanted |= {next((place for place in places if place in known), name)}
        elif isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            pending += node.orelse
        elif not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            pending += [child for child in ast.walk(node) if isinstance(child, ast.stmt) and child is not node]
    return wanted - {name}


def test_modules_import_each_other_in_one_direction() -> None:
    """No cycle: modules whose imports are all put aside are put aside too, until none is left."""
    trees = dict(modules())
    left = {name: loaded_with(name, tree, set(trees)) for name, tree in trees.items()}
    while ready := {name for name, needed in left.items() if not needed & left.keys()}:
        left = {name: needed for name, needed in left.items() if name not in ready}
    # What imports a cycle without being part of it is no cause.
    while outer := left.keys() - set().union(*left.values()) if left else set():
        left = {name: needed for name, needed in left.items() if name not in outer}
    assert not left, {name: sorted(needed & left.keys()) for name, needed in left.items()}


def test_no_private_name_crosses_a_package() -> None:
    wrong = []
    for name, tree in modules():
        package = ("llm2clip_hf." + name).rpartition(".")[0]
        for node in ast.walk(tree):
            for imported in imports(name, node) if isinstance(node, ast.Import | ast.ImportFrom) else ():
                module, _, taken = imported.rpartition(".")
                home = module.rpartition(".")[0]
                private = taken.startswith("_") and not taken.startswith("__")
                if private and imported.startswith("llm2clip_hf.") and module != package and home != package:
                    wrong.append(f"{name} imports {imported}")
    assert not wrong, wrong


def test_a_folder_holds_at_most_sixteen_files() -> None:
    counts = {path: len(list(path.glob("*.py"))) for path in [ROOT, *ROOT.rglob("*")] if path.is_dir()}
    too_full = {str(path.relative_to(ROOT)): count for path, count in counts.items() if count > 16}
    assert not too_full, too_full


def test_third_party_packages_have_one_owner() -> None:
    wrong = []
    for name, tree in modules():
        for imported in imports(name, tree):
            owners = OWNERS.get(imported.split(".")[0])
            if owners and not any(name == owner or name.startswith(owner + ".") for owner in owners):
                wrong.append(f"{name} imports {imported}")
            if imported.startswith("transformers") and "Trainer" in imported and not name.startswith("training"):
                wrong.append(f"{name} imports {imported}")
    assert not wrong, wrong


def test_remote_code_stands_alone() -> None:
    """What travels to the Hub: flat sibling imports, one per statement, and packages that every user has."""
    import sys

    for path in sorted((ROOT / "modeling").glob("*.py")):
        if path.name == "__init__.py":
            continue
        text = path.read_text()
        tree = ast.parse(text)
        siblings = 0
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and node.level:
                assert node.level == 1, path
                assert node.module and "." not in node.module, path
                assert (path.parent / f"{node.module}.py").exists(), (path, node.module)
                siblings += 1
            elif isinstance(node, ast.ImportFrom | ast.Import):
                names = [node.module or ""] if isinstance(node, ast.ImportFrom) else [a.name for a in node.names]
                for imported in names:
                    top = imported.split(".")[0]
                    allowed = REMOTE_CODE_MAY_IMPORT | REMOTE_EXTRAS.get(path.name, set())
                    assert top in allowed or top in sys.stdlib_module_names, (path, imported)
        # The exporter of transformers reads text, not syntax: no other line may look like a relative import.
        assert sum(line.lstrip().startswith("from .") for line in text.splitlines()) == siblings, path
        assert "from __future__ import annotations" not in text, path


def test_cli_imports_heavy_modules_inside_functions_only() -> None:
    for name, tree in modules():
        if not name.startswith("cli."):
            continue
        for node in tree.body:
            for imported in imports(name, node) if isinstance(node, ast.Import | ast.ImportFrom) else ():
                top = imported.split(".")[0]
                import sys

                ours = imported.startswith(("llm2clip_hf.version", "llm2clip_hf.cli."))
                assert top in sys.stdlib_module_names or ours, (name, imported)


def test_no_pickle_is_loaded_unguarded() -> None:
    wrong = []
    for name, tree in modules():
        for node in ast.walk(tree):
            if (
                isinstance(node, ast.Call)
                and isinstance(node.func, ast.Attribute)
                and node.func.attr in ("load", "loads")
            ):
                owner = ast.unparse(node.func.value)
                if owner == "pickle" or (
                    owner == "torch"
                    and not any(k.arg == "weights_only" and ast.unparse(k.value) == "True" for k in node.keywords)
                ):
                    wrong.append(f"{name}:{node.lineno}")
    assert not wrong, wrong


# ------------------------------------------------------------------------------------------- a transformers too old


def fake_transformers(folder: Path, version: str) -> dict[str, str]:
    """An environment in which that version is the installed one; its modules are those of no version."""
    (folder / f"transformers-{version}.dist-info").mkdir()
    (folder / f"transformers-{version}.dist-info" / "METADATA").write_text(f"Name: transformers\nVersion: {version}\n")
    (folder / "transformers").mkdir()
    (folder / "transformers" / "__init__.py").write_text(f"__version__ = {version!r}\n")
    return {**os.environ, "PYTHONPATH": os.pathsep.join([str(folder), str(ROOT.parent)])}


@pytest.mark.parametrize("version", ["4.57.1", "5.16.9"])
def test_transformers_that_is_too_old_is_named_in_one_line(tmp_path: Path, version: str) -> None:
    code = """
import importlib
for name in ("", ".ops", ".losses", ".data", ".modeling", ".training", ".evaluation", ".hub", ".cli.main"):
    try:
        importlib.import_module(f"llm2clip_hf{name}")
    except ImportError as error:
        print(error)
# The file of a saved folder, which has no package around it.
import sys
try:
    exec(compile(open(sys.argv[1]).read(), "remote", "exec"), {"__name__": "remote"})
except ImportError as error:
    print(error)
"""
    config = ROOT / "modeling" / "configuration_llm2clip.py"
    done = subprocess.run(
        [sys.executable, "-c", code, str(config)],
        env=fake_transformers(tmp_path, version), capture_output=True, text=True, check=True,
    )  # fmt: skip
    *parts, remote = done.stdout.splitlines()
    expected = f"needs transformers 5.17 or newer, found {version}. Update it: `pip install -U transformers`."
    assert parts == [f"`llm2clip_hf` {expected}"] * 9
    assert remote == f"LLM2CLIP {expected}"


def test_transformers_that_moved_a_name_is_told_the_supported_range(tmp_path: Path) -> None:
    code = "import llm2clip_hf\ntry: llm2clip_hf.LLM2CLIPModel\nexcept ImportError as error: print(error)"
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=fake_transformers(tmp_path, "6.1.0"), capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert done.stdout.startswith("`LLM2CLIPModel` needs transformers>=5.17,<6, found 6.1.0: ")
    assert done.stdout.endswith('Install a supported one: `pip install "transformers>=5.17,<6"`.\n')


def test_supported_transformers_are_those_of_the_metadata() -> None:
    text = (ROOT.parents[1] / "pyproject.toml").read_text()
    assert f'"transformers{llm2clip_hf._SUPPORTED_TRANSFORMERS}"' in text
