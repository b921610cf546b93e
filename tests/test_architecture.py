"""The import graph runs one way, and nothing in the library runs code from a file of data."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent / "ppvae"
FILES = {".".join(path.relative_to(ROOT.parent).with_suffix("").parts): path for path in ROOT.rglob("*.py")}
PARTS = ("ppvae.distributions", "ppvae.nn", "ppvae.parameter_names")
CONDITIONALS = ("ppvae.priors", "ppvae.likelihoods", "ppvae.posteriors")
ROOMS_OF_WORK = ("ppvae.inference", "ppvae.evaluation", "ppvae.training")
COMMANDS = ("ppvae.cli", "ppvae.cli.evaluate", "ppvae.cli.examine")
TOP = (*COMMANDS, "ppvae.cli.options", "ppvae.cli.flags", "ppvae.report", "ppvae.plots", "ppvae.generate")


class Imports(ast.NodeVisitor):
    """Every ppvae module that is imported anywhere in a file, except under TYPE_CHECKING."""

    def __init__(self, module: str, is_package: bool):
        self.found: set[str] = set()
        self.package = module.split(".") if is_package else module.split(".")[:-1]

    def visit_If(self, node: ast.If) -> None:
        if "TYPE_CHECKING" not in ast.unparse(node.test):
            self.generic_visit(node)
        else:
            for other in node.orelse:
                self.visit(other)

    def visit_Import(self, node: ast.Import) -> None:
        self.found |= {alias.name for alias in node.names}

    def visit_ImportFrom(self, node: ast.ImportFrom) -> None:
        base = node.module or ""
        if node.level:
            above = self.package[: len(self.package) - node.level + 1]
            base = ".".join([*above, *([base] if base else [])])
        # `from ppvae import nn` and `from ppvae.nn import mlp` name a module in different places
        self.found |= {name for a in node.names if (name := f"{base}.{a.name}") in modules()} or {base}

    def visit_Call(self, node: ast.Call) -> None:
        if ast.unparse(node.func).endswith("import_module") and node.args and isinstance(node.args[0], ast.Constant):
            self.found.add(str(node.args[0].value))
        self.generic_visit(node)


def modules() -> set[str]:
    return {name.removesuffix(".__init__") for name in FILES}


def imports(name: str, path: Path) -> set[str]:
    visitor = Imports(name.removesuffix(".__init__"), name.endswith(".__init__"))
    visitor.visit(ast.parse(path.read_text()))
    return {module for module in visitor.found if module == "ppvae" or module.startswith("ppvae.")}


GRAPH = {name.removesuffix(".__init__"): imports(name, path) for name, path in FILES.items()}


def inside(module: str, rooms) -> bool:
    return any(module == room or module.startswith(room + ".") for room in rooms)


def reached(start: str) -> set[str]:
    """What importing a module brings in, by way of other modules too; `ppvae` itself loads its parts on first use."""
    seen: set[str] = set()
    waiting = [start]
    while waiting:
        module = waiting.pop()
        if module in seen or module == "ppvae":
            continue
        seen.add(module)
        parents = [".".join(module.split(".")[:n]) for n in range(2, module.count(".") + 1)]
        waiting += [*GRAPH.get(module, ()), *parents]
    return seen - {start}


ROOMS = {  # a room, and the rooms that it must not reach
    "ppvae.errors": ("ppvae",),
    "ppvae.data": ("ppvae.models", *ROOMS_OF_WORK, *PARTS, *CONDITIONALS, *TOP),
    "ppvae.inference": (
        "ppvae.models",
        "ppvae.data",
        "ppvae.evaluation",
        "ppvae.training",
        *PARTS,
        *CONDITIONALS,
        *TOP,
    ),
    "ppvae.objectives": ("ppvae.models", "ppvae.evaluation", "ppvae.training", *PARTS, *CONDITIONALS, *TOP),
    "ppvae.evaluation": ("ppvae.models", "ppvae.training", *PARTS, *CONDITIONALS, *TOP),
    "ppvae.models": ("ppvae.data", "ppvae.objectives", *ROOMS_OF_WORK, *TOP),
    "ppvae.training": ("ppvae.models", *TOP),
    "ppvae.generate": (
        "ppvae.models",
        "ppvae.training",
        "ppvae.cli.main",
        "ppvae.cli.commands",
        "ppvae.report",
        "ppvae.plots",
    ),
    "ppvae.plots": ("ppvae.cli", "ppvae.training.fit", "ppvae.report"),
    "ppvae.report": ("ppvae.cli"),
    **dict.fromkeys(PARTS, ("ppvae.models", "ppvae.data", *ROOMS_OF_WORK, *CONDITIONALS, *TOP)),
    **dict.fromkeys(CONDITIONALS, ("ppvae.models", "ppvae.data", *ROOMS_OF_WORK, *TOP)),
}


def test_the_rooms_exist():
    assert "ppvae.inference.terms" in GRAPH
    assert all(inside(room, modules()) for room in ROOMS)
    assert len(GRAPH) > 40


def test_the_reader_of_imports_reads_every_kind(tmp_path):
    path = tmp_path / "weights.py"
    path.write_text(
        "'''\n>>> from ppvae.training import fit\n'''\n"
        "from typing import TYPE_CHECKING\n"
        "if TYPE_CHECKING:\n    from ppvae.evaluation import psis\n"
        "import ppvae.nn\n"
        "from ppvae import priors, errors as e\n"
        "from . import scope\n"
        "from ..data import checks\n"
        "def f():\n    from ppvae.models.vae import VAE\n    importlib.import_module('ppvae.cli.main')\n"
    )
    assert imports("ppvae.inference.terms", path) == {
        "ppvae.nn", "ppvae.priors", "ppvae.errors", "ppvae.inference.param_store", "ppvae.data.checks",
        "ppvae.models.vae", "ppvae.cli.main",
    }  # fmt: skip


@pytest.mark.parametrize("room", ROOMS)
def test_imports_run_one_way(room):
    for module in GRAPH:
        if inside(module, [room]):
            wrong = {m for m in reached(module) if inside(m, ROOMS[room]) and not inside(m, [room])}
            assert not wrong, f"{module} reaches {sorted(wrong)}"


def test_data_imports_nothing_but_errors():
    for module, found in GRAPH.items():
        if inside(module, ["ppvae.data"]):
            assert all(inside(m, ("ppvae.data", "ppvae.errors")) for m in found), module


def test_models_and_inference_never_import_each_other():
    for one, other in (("ppvae.models", "ppvae.inference"), ("ppvae.inference", "ppvae.models")):
        for module in GRAPH:
            if inside(module, [one]):
                assert not [m for m in reached(module) if inside(m, [other])], module


def test_there_is_no_cycle_between_modules():
    """Imports at the top of a file; a late import inside a function may close a circle."""
    top = {}
    for name, path in FILES.items():
        visitor = Imports(name.removesuffix(".__init__"), name.endswith(".__init__"))
        for node in ast.parse(path.read_text()).body:
            if not isinstance(node, ast.FunctionDef | ast.ClassDef):
                visitor.visit(node)
        top[name.removesuffix(".__init__")] = {m for m in visitor.found if m in modules()}
    done: set[str] = set()

    def walk(module: str, way: tuple[str, ...]) -> None:
        assert module not in way, " -> ".join((*way, module))
        if module not in done:
            for other in top[module]:
                walk(other, (*way, module))
            done.add(module)

    for module in top:
        walk(module, ())


@pytest.mark.parametrize("name", ["ppvae.cli.main", "ppvae.errors", "ppvae"])
def test_what_help_needs_imports_only_python(name):
    path = FILES.get(name) or FILES[f"{name}.__init__"]
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.Import | ast.ImportFrom):
            text = ast.unparse(node)
            assert not re.search(r"\b(torch|pyro|numpy|tyro|sklearn)\b", text), text


UNSAFE_MODULES = ("pickle", "cPickle", "_pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal", "jsonpickle")


@pytest.mark.parametrize("name", sorted(FILES))
def test_nothing_is_unpickled(name):
    """No pickle, no `weights_only=False`, no `allow_pickle=True`, no eval: files are data."""
    for node in ast.walk(ast.parse(FILES[name].read_text())):
        if isinstance(node, ast.Import):
            assert not {a.name.split(".")[0] for a in node.names} & set(UNSAFE_MODULES)
        if isinstance(node, ast.ImportFrom):
            assert (node.module or "").split(".")[0] not in UNSAFE_MODULES
        if not isinstance(node, ast.Call):
            continue
        call = ast.unparse(node.func)
        given = {k.arg: ast.unparse(k.value) for k in node.keywords}
        assert given.get("weights_only", "True") == "True"
        assert given.get("allow_pickle", "False") == "False"
        if call == "torch.load":
            assert given.get("weights_only") == "True"
        if call in ("np.load", "numpy.load"):
            assert given.get("allow_pickle") == "False"
        assert call not in ("eval", "exec", "os.system", "torch.jit.load", "yaml.load", "yaml.unsafe_load")
