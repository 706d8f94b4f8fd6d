"""The package as a whole: the order of imports, a light import, docstrings that are complete and true, the version."""

import ast
import doctest
import importlib
import inspect
import itertools
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import unrolled
from unrolled import metrics, problems

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "unrolled"
FILES = sorted(PACKAGE.rglob("*.py"))
ROOMS = {path.relative_to(PACKAGE).parts[0].removesuffix(".py") for path in FILES}

# ---- The order of imports --------------------------------------------------------------------------------------------

# A room is a file or a subpackage; it imports from the rows above its own. A new room needs a place here.
RANKS = [
    {"_check", "_config", "_modes"},
    {"_tree"},
    {"functional", "operators", "metrics"},
    {"solvers", "step", "gradient", "stopping"},
    {"unroll"},
    {"momentum", "shrinkage", "autoencoder"},
    {"sparse", "lowrank", "crf", "cluster", "image", "neighbours", "scene"},
    {"problems", "losses", "trace", "report", "training", "decoupled", "sketch"},
    {"recipes"},
    {"io"},
    {"__init__"},
    {"estimators", "plot"},
    {"demo", "__main__"},
]
RANK = {room: rank for rank, rooms in enumerate(RANKS) for room in rooms}
# What may be imported within a row: in both directions, and in one.
TOGETHER = [{"step", "gradient", "stopping"}, {"problems", "losses", "training"}]
ONE_WAY = {("operators", "functional"), ("sketch", "trace"), ("__main__", "demo")}
# What may be imported from a higher row, inside of the function that needs it.
ON_DEMAND = {("report", "plot")}
# Rooms that are held to less than their row allows.
ONLY = {"momentum": {"_check", "_tree", "step"}, "autoencoder": {"_check", "functional"}}
# Libraries that only these rooms may import, wherever in the file.
CONFINED = {"sklearn": {"estimators", "demo", "__main__"}, "matplotlib": {"plot"}}
# Libraries that nobody imports while being imported.
LATE = {"scipy"}


def imports(source: str, package: str) -> list[tuple[str, bool, int]]:
    """(absolute dotted name, whether it runs when the file is imported, line) of every import."""
    found = []

    def visit(node, at_import):
        if isinstance(node, ast.Import):
            found.extend((alias.name, at_import, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            origin = ".".join([*base, *([node.module] if node.module else [])])
            # `from unrolled import x` may name a module; deeper down the module's own name is enough to know the room.
            names = [f"{origin}.{alias.name}" for alias in node.names] if origin == "unrolled" else [origin]
            found.extend((name, at_import, node.lineno) for name in names)
        inside = at_import and not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
        for child in ast.iter_child_nodes(node):
            visit(child, inside)

    visit(ast.parse(source), True)
    return found


def violations(source: str, file: str) -> list[str]:
    """What is wrong with the imports of this source, as the package's file `file` ("sparse/ista.py")."""
    *folders, stem = file.removesuffix(".py").split("/")
    room = folders[0] if folders else stem
    if room not in RANK:
        return [f"{file}: the room {room!r} has no rank: give it a place in RANKS"]
    wrong = []
    for name, at_import, line in imports(source, ".".join(["unrolled", *folders])):
        library, *inner = name.split(".")
        complaint = None
        if library == "unrolled":
            # What is no room is a name of unrolled/__init__.py, which imports nearly everything.
            target = inner[0] if inner and inner[0] in {*RANK, *ROOMS} else "__init__"
            complaint = None if not at_import and (room, target) in ON_DEMAND else _judge(room, target)
        elif room not in CONFINED.get(library, {room}):
            complaint = f"only {', '.join(sorted(CONFINED[library]))} may import {library}"
        elif library in LATE and at_import:
            complaint = f"{library} must be imported inside the function that needs it"
        if complaint:
            wrong.append(f"{file}, line {line}: imports {name}, but {complaint}")
    return wrong


def _judge(room: str, target: str) -> str | None:
    if target not in RANK:
        return f"the room {target!r} has no rank: give it a place in RANKS"
    if room in ONLY and target not in ONLY[room]:
        return f"{room} imports only {', '.join(sorted(ONLY[room]))}"
    listed = (room, target) in ONE_WAY or any({room, target} <= rooms for rooms in TOGETHER)
    if room == target or RANK[target] < RANK[room] or listed:
        return None
    return "its rank is " + ("the same" if RANK[target] == RANK[room] else "higher")


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_come_from_lower_ranks(path):
    file = path.relative_to(PACKAGE).as_posix()
    assert not violations(path.read_text(), file)
    assert ast.get_docstring(ast.parse(path.read_text())), "a file says what it is for"


@pytest.mark.parametrize(
    ("file", "source", "complaint"),
    [
        ("functional.py", "from unrolled.solvers import ista", "its rank is higher"),
        ("functional.py", "from unrolled.operators import Dense", "its rank is the same"),
        ("_tree.py", "from unrolled.step import Step", "its rank is higher"),
        ("gradient.py", "def f():\n    from unrolled.unroll import Unroll", "its rank is higher"),
        ("solvers.py", "from .unroll import Unroll", "its rank is higher"),
        ("solvers.py", "from . import functional, unroll", "imports unrolled.unroll, but its rank is higher"),
        ("solvers.py", "from unrolled.step import Step", "its rank is the same"),
        ("momentum.py", "from unrolled.solvers import ista", "momentum imports only _check, _tree, step"),
        ("sparse/ista.py", "from unrolled.crf.meanfield import CRFasRNN", "its rank is the same"),
        ("sparse/ista.py", "from ..crf import CRFasRNN", "its rank is the same"),
        ("sparse/ista.py", "import unrolled.training.loop as loop", "its rank is higher"),
        ("sparse/ista.py", "from unrolled import LISTA", "its rank is higher"),
        ("sparse/ista.py", "import unrolled", "its rank is higher"),
        ("trace.py", "from unrolled.report import LayerReport", "its rank is the same"),
        ("report.py", "from unrolled.plot import gap_curve", "its rank is higher"),
        ("__init__.py", "from .estimators import SparseCoder", "its rank is higher"),
        ("__init__.py", "from . import plot as plot", "its rank is higher"),
        ("newcomer.py", "", "the room 'newcomer' has no rank"),
        ("newcomers/one.py", "import torch", "the room 'newcomers' has no rank"),
        ("metrics.py", "def f():\n    import sklearn.metrics", "only __main__, demo, estimators may import sklearn"),
        ("report.py", "from matplotlib import pyplot", "only plot may import matplotlib"),
        ("solvers.py", "import scipy.sparse", "scipy must be imported inside"),
        ("solvers.py", "if True:\n    from scipy import linalg", "scipy must be imported inside"),
        ("solvers.py", "class A:\n    import scipy", "line 2: imports scipy"),
    ],
)
def test_the_checker_sees_a_violation(file, source, complaint):
    (found,) = violations(source, file)
    assert complaint in found and found.startswith(file)


@pytest.mark.parametrize(
    ("file", "source"),
    [
        ("operators.py", "from unrolled.functional import operator_norm"),
        ("stopping.py", "from unrolled.step import Step"),
        ("losses.py", "from .metrics import nmse"),
        ("sparse/ista.py", "from ._steps import DictionaryStep\nfrom unrolled import _check\nimport torch, math"),
        ("sparse/__init__.py", "from .ista import LISTA as LISTA"),
        ("__init__.py", "from . import training\nfrom .sparse import LISTA as LISTA"),
        ("estimators.py", "import sklearn\nfrom unrolled.training import fit"),
        ("__main__.py", "from unrolled import LISTA, plot\nfrom unrolled.demo import main"),
        ("problems.py", "def f():\n    import scipy"),
        ("plot.py", "def f():\n    import matplotlib.pyplot as plt"),
        ("report.py", "def f():\n    from unrolled.plot import gap_curve"),
    ],
)
def test_the_checker_lets_pass_what_is_allowed(file, source):
    assert violations(source, file) == []


def test_the_import_is_light():
    code = "import sys, torch; before = set(sys.modules); import unrolled; print(*sorted(set(sys.modules) - before))"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    loaded = {name.split(".")[0] for name in run.stdout.split()}
    assert "unrolled" in loaded
    assert not loaded & {
        "sklearn",
        "scipy",
        "matplotlib",
        "PIL",
        "pandas",
        "tqdm",
        "torchvision",
        "onnx",
        "safetensors",
    }
    assert run.stderr == ""


# ---- Docstrings ------------------------------------------------------------------------------------------------------

MODULES = [
    "functional",
    "solvers",
    "operators",
    "gradient",
    "sparse",
    "lowrank",
    "crf",
    "cluster",
    "shrinkage",
    "image",
    "io",
    "neighbours",
    "decoupled",
    "losses",
    "report",
    "scene",
    "sketch",
    "stopping",
    "training",
    "recipes",
]


def public(module):
    """(name, object) of the functions and classes that a module offers as its own."""
    for name, thing in sorted(vars(module).items()):
        ours = getattr(thing, "__module__", "").startswith(module.__name__)
        if not name.startswith("_") and (inspect.isclass(thing) or inspect.isfunction(thing)) and ours:
            yield name, thing


PUBLIC = {
    f"{thing.__module__}.{name}": thing
    for module in (unrolled, *(importlib.import_module(f"unrolled.{name}") for name in MODULES))
    for name, thing in public(module)
}


@pytest.mark.parametrize("name", PUBLIC)
def test_what_is_public_is_documented(name):
    thing = PUBLIC[name]
    text = vars(thing).get("__doc__") if inspect.isclass(thing) else thing.__doc__
    assert text and not text.startswith(f"{thing.__name__}("), "a docstring of its own"  # not a dataclass's signature
    takes = thing if inspect.isfunction(thing) else vars(thing).get("__init__")
    if inspect.isfunction(takes) and not getattr(thing, "_is_protocol", False):
        named = [parameter for parameter in inspect.signature(takes).parameters if parameter != "self"]
        missing = [parameter for parameter in named if not re.search(rf"\b{parameter}\b", text)]
        assert not missing, f"parameters that the docstring does not mention: {missing}"


EXAMPLES = [
    ".".join(path.relative_to(ROOT).with_suffix("").parts)
    for path in FILES
    if path.stem not in {"__init__", "__main__"} and ">>>" in path.read_text() and "demo" not in path.parts
]


@pytest.mark.parametrize("name", EXAMPLES)
def test_examples_are_true(name):
    module = importlib.import_module(name)
    names = {"torch": torch, **{full.split(".")[-1]: thing for full, thing in PUBLIC.items()}}
    names.update([*public(problems), *public(metrics)])
    runner, report = doctest.DocTestRunner(), []
    for example in doctest.DocTestFinder().find(module, name, extraglobs=names):
        torch.manual_seed(0)
        runner.run(example, out=report.append)
    assert not runner.failures, "".join(report)


def test_the_examples_that_must_run_are_run():
    """Marking them all SKIP would make the test above pass."""
    for name in ("functional", "operators", "solvers.lasso", "step"):
        module = importlib.import_module(f"unrolled.{name}")
        examples = [example for test in doctest.DocTestFinder().find(module) for example in test.examples]
        assert any(example.want and not example.options.get(doctest.SKIP) for example in examples), name


# ---- The tree --------------------------------------------------------------------------------------------------------


def test_no_path_of_somebodys_machine():
    machine = re.compile(r"(?<![\w./~:-])(?:/(?:work|opt|tmp|home|root|Users|mnt)/\w|[A-Z]:\\\\?Users)")
    kinds = {".py", ".md", ".toml", ".txt", ".yml", ".yaml", ".json", ".cfg", ".sh", ".ipynb", ""}
    found = []
    outputs = {"site", "build", "dist", "demo"}
    tops = [top for top in ROOT.iterdir() if top.name == ".ci" or not (top.name.startswith(".") or top.name in outputs)]
    for path in itertools.chain.from_iterable([top, *top.rglob("*")] for top in tops):
        if path.is_file() and path.suffix in kinds:
            lines = path.read_text(errors="replace").splitlines()
            found += [f"{path}:{k}: {line}" for k, line in enumerate(lines, 1) if machine.search(line)]
    assert not found
    assert machine.search("open('/" + "home/me/x')") and not machine.search("https://example.org/home/x")


def test_the_changelog_tells_of_this_version():
    headings = re.findall(r"^## \[(\S+)\]", (ROOT / "CHANGELOG.md").read_text(), flags=re.MULTILINE)
    assert unrolled.__version__ in headings
