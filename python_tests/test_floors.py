"""Imports run downwards: each floor imports from itself and from the floors below it, and there are no circles."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "selmatch_ext"
FLOORS = """
    openmp allocator strict_json ranges seeds output compiling stages built_for cli_help
    ranks clock files precision
    arrays
    second_order
    ops
    transfers
    settings
    provenance
    modules
    threads
    models
    data
    context
    fused
    unroll
    training sharpness
    learned_steps
    evaluation
    selection selection.window selection.coreset selection.scores selection.aum selection.grand selection.uncertainty
    selection.moderate selection.strata selection.d2 selection.gradients
    selection.features selection.difficulty selection.partial_update
    experts
    selection.window_search
    selection.start
    methods
    preflight report doctor
    page
    runner
    studies
    recipes
    cli_process
    cli_settings
    cli_studies cli_files cli_doctor cli_completion
    cli
    __init__ __main__
"""
RANK = {name: number for number, line in enumerate(FLOORS.strip().splitlines()) for name in line.split()}


def floor(module):
    """Number of the floor of a module without the package's name, such as ops.dsa."""
    parts = module.split(".")
    names = [".".join(parts[:n]) for n in range(len(parts), 0, -1)]
    return next((RANK[name] for name in names if name in RANK), None)


def modules():
    found = {}
    for path in PACKAGE.rglob("*.py"):
        name = ".".join(path.relative_to(PACKAGE).with_suffix("").parts)
        found[name.removesuffix(".__init__")] = path
    return found


MODULES = modules()


def imports(path):
    """Modules of the package that the file imports when it runs, also inside functions; not those for type checkers."""
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            node.body = []
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "selmatch_ext":
            base = node.module.removeprefix("selmatch_ext").lstrip(".")
            for alias in node.names:
                full = f"{base}.{alias.name}".lstrip(".")
                yield full if full in MODULES else base
        elif isinstance(node, ast.Import):
            yield from (a.name.removeprefix("selmatch_ext.") for a in node.names if a.name.startswith("selmatch_ext."))


@pytest.mark.parametrize("name", sorted(MODULES))
def test_imports_run_downwards(name):
    own = floor(name)
    assert own is not None, f"{name} is on no floor"
    for other in imports(MODULES[name]):
        if other in ("_C", ""):
            continue
        assert floor(other) is not None and floor(other) <= own, f"{name} imports {other} from a floor above it"


def test_there_are_no_circles():
    graph = {name: {other for other in imports(path) if other in MODULES} for name, path in MODULES.items()}
    done, path = set(), []

    def visit(name):
        assert name not in path, " -> ".join([*path[path.index(name) :], name])
        if name in done:
            return
        path.append(name)
        for other in graph[name]:
            visit(other)
        done.add(path.pop())

    for name in graph:
        visit(name)


@pytest.mark.parametrize("name", sorted(MODULES))
def test_functions_take_at_most_seven_arguments(name):
    allowed = {"unrolled_sgd", "sample_augmentation"}
    for node in ast.walk(ast.parse(MODULES[name].read_text())):
        if isinstance(node, ast.FunctionDef) and node.name not in allowed:
            given = [a.arg for a in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)]
            assert len(set(given) - {"self", "cls"}) <= 7, f"{node.name} takes {len(given)} arguments"
