"""The architecture: imports run one way, rooms stay small, and nothing in the library runs code from a file of data.

`python tests/test_architecture.py` prints the number of modules, classes and lines of each room.
"""

import ast
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent / "ppvae"
MAX_LINES = 350  # of a file
MAX_FILES = 15  # of a room, __init__ counted in
MAX_ROOT_MODULES = 6  # beside ppvae/__init__.py

# Floors, from the lowest up. A room is a folder or a module of ppvae/; it imports only rooms of lower floors. The room
# "ppvae" is ppvae/__init__.py.
FLOORS = (
    "errors",
    "rng storage distributed parameter_names",
    "run_folder",
    "data factories",
    "distributions nn",
    "priors",
    "likelihoods posteriors",
    "models",
    "compilation",
    "inference",
    "objectives evaluation",
    "generate plots training",
    "report",
    "ppvae",
    "cli",
    "__main__",
)
FLOOR = {room: i for i, floor in enumerate(FLOORS) for room in floor.split()}
PARTS = ("distributions", "nn", "priors", "likelihoods", "posteriors")
WORK = (
    "compilation",
    "inference",
    "objectives",
    "evaluation",
    "training",
    "generate",
    "plots",
    "report",
    "ppvae",
    "cli",
)

# Rooms that a room does not reach, by way of other rooms either.
UNREACHABLE = {
    **dict.fromkeys((*PARTS, "models"), ("data", *WORK)),
    "data": tuple(room for room in FLOOR if room not in ("data", "errors", "rng")),
    "compilation": (*PARTS, "models", "data"),
    "inference": (*PARTS, "models", "data"),
    **dict.fromkeys(("objectives", "evaluation", "generate", "plots", "training"), (*PARTS, "models")),
}


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(ROOT.parent).with_suffix("").parts).removesuffix(".__init__")


PATHS = {module_name(path): path for path in sorted(ROOT.rglob("*.py"))}
TREES = {module: ast.parse(path.read_text()) for module, path in PATHS.items()}


class Imports(ast.NodeVisitor):
    """The modules that a file imports at any place: late imports, TYPE_CHECKING blocks and `import_module` counted in.

    Attributes:
        modules: full names. A package that holds an imported module counts only where one of its own names is imported.
        names: (module, name) of every imported name and of every attribute of an imported module.
    """

    def __init__(self, module: str, is_package: bool):
        self.modules: set[str] = set()
        self.names: set[tuple[str, str]] = set()
        self.package = module.split(".") if is_package else module.split(".")[:-1]
        self.aliases: dict[str, str] = {}

    def visit_Import(self, node: ast.Import) -> None:
        for alias in node.names:
            self.modules.add(alias.name)
            if alias.asname:
                self.aliases[alias.asname] = alias.name

    def visit_ImportFrom(self, node: ast.ImportFrom) -> None:
        base = node.module or ""
        if node.level:
            above = self.package[: len(self.package) - node.level + 1]
            base = ".".join([*above, *([base] if base else [])])
        for alias in node.names:
            full = f"{base}.{alias.name}"
            self.modules.add(full if full in PATHS else base)
            self.names.add((base, alias.name))
            if full in PATHS:
                self.aliases[alias.asname or alias.name] = full

    def visit_Call(self, node: ast.Call) -> None:
        if ast.unparse(node.func).endswith("import_module") and node.args and isinstance(node.args[0], ast.Constant):
            self.modules.add(str(node.args[0].value))
        self.generic_visit(node)

    def visit_Attribute(self, node: ast.Attribute) -> None:
        owner = ast.unparse(node.value)
        self.names.add((self.aliases.get(owner, owner), node.attr))
        self.generic_visit(node)


def read_imports(module: str, tree: ast.Module, is_package: bool = False) -> Imports:
    visitor = Imports(module, is_package)
    visitor.visit(tree)
    visitor.modules = {name for name in visitor.modules if name == "ppvae" or name.startswith("ppvae.")}
    visitor.names = {(name, attribute) for name, attribute in visitor.names if name.split(".")[0] == "ppvae"}
    return visitor


IMPORTS = {name: read_imports(name, tree, PATHS[name].stem == "__init__") for name, tree in TREES.items()}
GRAPH = {name: {other for other in visitor.modules if other != name} for name, visitor in IMPORTS.items()}


def room_of(module: str) -> str:
    """The floor plan's room of a module.

    >>> room_of("ppvae.inference.contract.support"), room_of("ppvae.errors"), room_of("ppvae")
    ('inference', 'errors', 'ppvae')
    """
    return module.split(".")[1] if "." in module else module


def subroom_of(module: str) -> str:
    """The folder that holds a module; a package is a group of its own, since it re-exports what its folders hold."""
    return module if PATHS[module].stem == "__init__" else module.rpartition(".")[0]


def contracted(graph: dict[str, set[str]], key: Callable[[str], str]) -> dict[str, set[str]]:
    """The graph between groups of modules, without the edges within a group."""
    out: dict[str, set[str]] = {}
    for module, others in graph.items():
        out.setdefault(key(module), set()).update(key(other) for other in others if key(other) != key(module))
    return out


def circles(graph: dict[str, set[str]]) -> list[list[str]]:
    """Groups of nodes that reach one another: the strongly connected components of two nodes or more."""
    reach = {node: reached(node, graph) for node in graph}
    groups = {frozenset([node, *(m for m in reach[node] if node in reach.get(m, ()))]) for node in graph}
    return sorted(sorted(group) for group in groups if len(group) > 1)


def reached(start: str, graph: dict[str, set[str]]) -> set[str]:
    """What importing a module brings in, by way of other modules too."""
    seen: set[str] = set()
    waiting = [start]
    while waiting:
        for other in graph.get(waiting.pop(), ()):
            if other not in seen:
                seen.add(other)
                waiting.append(other)
    return seen


def folders() -> Iterator[tuple[str, list[Path]]]:
    """Every folder of ppvae/ with its Python files."""
    for folder in sorted({path.parent for path in PATHS.values()}):
        yield folder.relative_to(ROOT.parent).as_posix(), sorted(folder.glob("*.py"))


# --- how imports are read ---


def test_every_import_is_counted():
    source = (
        "'''\n>>> from ppvae.training import fit\n'''\n"
        "from typing import TYPE_CHECKING\n"
        "if TYPE_CHECKING:\n    from ppvae.evaluation.importance import psis\n"
        "import ppvae.nn\n"
        "from ppvae import priors, errors as e\n"
        "from . import param_store\n"
        "from ..data import checks\n"
        "def f():\n    from ppvae.models.vae import VAE\n    importlib.import_module('ppvae.cli.main')\n"
        "    return e._hidden\n"
    )
    found = read_imports("ppvae.inference.terms", ast.parse(source))
    assert found.modules == {
        "ppvae.evaluation.importance.psis", "ppvae.nn", "ppvae.priors", "ppvae.errors", "ppvae.inference.param_store",
        "ppvae.data.checks", "ppvae.models.vae", "ppvae.cli.main",
    }  # fmt: skip
    assert ("ppvae.errors", "_hidden") in found.names


def test_a_circle_is_found():
    graph = {"a": {"b"}, "b": {"c"}, "c": {"b", "d"}, "d": set(), "e": {"f"}, "f": {"e"}}
    assert circles(graph) == [["b", "c"], ["e", "f"]]
    assert reached("a", graph) == {"b", "c", "d"}


def test_the_rooms_exist():
    assert set(FLOOR) == {room_of(module) for module in PATHS}
    assert "ppvae.inference.terms" in GRAPH
    assert len(GRAPH) > 40


# --- imports run one way ---


@pytest.mark.parametrize("room", FLOOR)
def test_a_room_imports_only_lower_floors(room):
    for module, others in GRAPH.items():
        if room_of(module) == room:
            wrong = {m for m in others if room_of(m) != room and FLOOR[room_of(m)] >= FLOOR[room]}
            assert not wrong, f"{module} imports {sorted(wrong)}"


@pytest.mark.parametrize("room", UNREACHABLE)
def test_a_room_does_not_reach(room):
    for module in GRAPH:
        if room_of(module) == room:
            wrong = {m for m in reached(module, GRAPH) if room_of(m) in UNREACHABLE[room]}
            assert not wrong, f"{module} reaches {sorted(wrong)}"


def test_models_and_inference_never_import_each_other():
    for one, other in (("models", "inference"), ("inference", "models")):
        for module in GRAPH:
            if room_of(module) == one:
                assert not [m for m in reached(module, GRAPH) if room_of(m) == other], module


def test_there_is_no_circle_between_modules():
    assert circles(GRAPH) == []


def test_there_is_no_circle_between_rooms():
    assert circles(contracted(GRAPH, room_of)) == []


def test_there_is_no_circle_between_folders_side_by_side():
    """A room's files and the folders inside it may use each other; folders of one room run one way."""
    graph = contracted(GRAPH, subroom_of)
    between = {
        one: {other for other in others if not (f"{one}.").startswith(f"{other}.") and not other.startswith(f"{one}.")}
        for one, others in graph.items()
    }
    assert circles(between) == []


@pytest.mark.parametrize("module", sorted(PATHS))
def test_private_names_stay_in_their_module(module):
    """No module imports `_name`, or a module `_name`, or reads `other._name` of another module."""
    private = {
        f"{other}.{name}"
        for other, name in IMPORTS[module].names
        if name.startswith("_") and not name.endswith("__") and other in PATHS and other != module
    }
    private |= {other for other in IMPORTS[module].modules if re.search(r"\._(?!_)", other)}
    assert not private


# --- rooms stay small ---


@pytest.mark.parametrize("module", sorted(PATHS))
def test_a_file_is_short(module):
    count = len(PATHS[module].read_text().splitlines())
    assert count <= MAX_LINES, f"{module} has {count} lines"


@pytest.mark.parametrize(("folder", "files"), [pytest.param(*pair, id=pair[0]) for pair in folders()])
def test_a_room_has_few_files(folder, files):
    limit = MAX_ROOT_MODULES + 1 if folder == "ppvae" else MAX_FILES
    assert len(files) <= limit, f"{folder} has {len(files)} files"


@pytest.mark.parametrize("folder", [name for name, _ in folders()])
def test_a_room_says_what_it_is_for(folder):
    tree = TREES[folder.replace("/", ".")]
    assert len(ast.get_docstring(tree) or "") > 30


# --- what is imported at the start, and what is never called ---


@pytest.mark.parametrize("module", ["ppvae.cli.main", "ppvae.errors", "ppvae"])
def test_what_help_needs_imports_only_python(module):
    for node in TREES[module].body:
        if isinstance(node, ast.Import | ast.ImportFrom):
            text = ast.unparse(node)
            assert not re.search(r"\b(torch|pyro|numpy|tyro|sklearn)\b", text), text


UNSAFE_MODULES = ("pickle", "cPickle", "_pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal", "jsonpickle")


@pytest.mark.parametrize("module", sorted(PATHS))
def test_nothing_is_unpickled(module):
    """No pickle, no `weights_only=False`, no `allow_pickle=True`, no eval: files are data."""
    for node in ast.walk(TREES[module]):
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


@pytest.mark.parametrize("module", sorted(PATHS))
def test_files_are_written_by_storage(module):
    """No `path.write_bytes` or `path.write_text`, which leave half a file behind where they are interrupted."""
    if module != "ppvae.storage":
        calls = [node.func for node in ast.walk(TREES[module]) if isinstance(node, ast.Call)]
        assert not [f.attr for f in calls if isinstance(f, ast.Attribute) and f.attr in ("write_bytes", "write_text")]


def summary() -> str:
    """Modules, classes and lines of each folder, the longest file, and the circles, if any."""
    lines = [f"{'room':32}{'files':>6}{'classes':>9}{'lines':>8}  longest file"]
    totals = [0, 0, 0]
    for folder, files in folders():
        sizes = {path: len(path.read_text().splitlines()) for path in files}
        classes = sum(isinstance(node, ast.ClassDef) for p in files for node in ast.walk(TREES[module_name(p)]))
        longest = max(sizes, key=lambda path: sizes[path])
        row = [len(files), classes, sum(sizes.values())]
        totals = [a + b for a, b in zip(totals, row, strict=True)]
        lines.append(f"{folder:32}{row[0]:6}{row[1]:9}{row[2]:8,}  {longest.name} ({sizes[longest]})")
    lines.append(f"{'together':32}{totals[0]:6}{totals[1]:9}{totals[2]:8,}")
    return "\n".join([*lines, *(f"circle: {' '.join(circle)}" for circle in circles(GRAPH))])


if __name__ == "__main__":
    print(summary())
