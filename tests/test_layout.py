"""What the repository promises about itself: python -m pytest tests/test_layout.py

The scripts run without experiments/ and tests/; imports run one way, from the outside in; the files are as long as they may be.
"""

import ast
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from support import tiny

ROOT = Path(__file__).parent.parent
OWN = [ROOT / "l2d.py", ROOT / "train.py", ROOT / "sample.py", *sorted((ROOT / "support").glob("*.py"))]
OUTER = sorted((ROOT / "experiments").glob("*.py"))
TESTS = [*sorted(ROOT.glob("test_*.py")), *sorted((ROOT / "tests").glob("*.py"))]
FILES = {".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): file for file in [*OWN, *OUTER, *TESTS]}


def test_every_file_is_known():
    """Else the tests below would leave it out."""
    there = {file for file in [*ROOT.glob("*.py"), *ROOT.glob("[!.]*/*.py")] if file.parent.name not in ("out", "build")}
    assert there == set(FILES.values())


# ---- The scripts alone -----------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def copy(tmp_path_factory):
    """A copy of what a reader needs, with a base and chats in it, and how to run a script there."""
    folder = tmp_path_factory.mktemp("copy")
    for file in OWN:
        target = folder / file.relative_to(ROOT)
        target.parent.mkdir(exist_ok=True)
        shutil.copy(file, target)

    def run(*args):
        environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        done = subprocess.run([sys.executable, *map(str, args)], cwd=folder, capture_output=True, text=True,
                              env=environment | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"})
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout
    (folder / "out").mkdir()
    torch.manual_seed(0)
    tokenizer, rows = tiny.make_tokenizer(), tiny.questions(60, seed=0)
    base = tiny.make_model(tokenizer, hidden=32, layers=2, ffn=48)
    tiny.save(folder / "out/tiny-base", base, tokenizer, train=rows, test=rows)
    return folder, run


def test_the_scripts_work_without_experiments_and_tests(copy):
    """`python train.py` as it is, but for the minutes that teaching the base takes; then sample.py."""
    folder, run = copy
    assert not (folder / "experiments").exists() and not (folder / "tests").exists()
    assert "2 steps of 128" in run("train.py", "--max-steps", 2, "--dim", 8, "--cond-dim", 8, "--device", "cpu")
    out = folder / "out/tiny-base-l2d"
    assert {"config.json", "model.safetensors", "log.jsonl", "README.md"} <= {file.name for file in out.iterdir()}
    options = json.loads((out / "args.json").read_text())
    assert options["model"] == "out/tiny-base" and options["data"] == "out/tiny-base/train.jsonl" and options["label_column"] == "label"
    answers = run("sample.py", "--steps", 3, "--max-new-tokens", 3, "--trace", "--device", "cpu")
    assert answers.count("(right: ") == 9 and "T = 3: 3 evaluations in" in answers


# ---- Imports ---------------------------------------------------------------------------------------------------------

def imports(file):
    """The repository's own modules that a file imports, anywhere in it."""
    names = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file.name}: a relative import"
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    names |= {f"tests.{name}" for name in names}         # a test names its neighbours so
    return {name for name in names if name in FILES and FILES[name].name != "__init__.py"}


GRAPH = {name: imports(file) for name, file in FILES.items()}


def area(name):
    """How far out a module is: l2d.py, support/, the two scripts, experiments/, tests."""
    first = name.split(".")[0]
    if first.startswith("test"):
        return 4
    return {"l2d": 0, "support": 1, "train": 2, "sample": 2, "experiments": 3}[first]


def test_the_graph_is_not_empty():
    assert {"l2d", "support.chats", "support.console"} <= GRAPH["train"] & GRAPH["sample"]


@pytest.mark.parametrize("name", FILES)
def test_imports_run_inwards(name):
    """Nothing imports from further out: support/ no script, l2d.py and the scripts nothing of experiments/, none of them a test."""
    assert not {other for other in GRAPH[name] if area(other) > area(name)}
    if name == "l2d":
        assert not GRAPH[name]
    if name in ("train", "sample"):
        assert not GRAPH[name] & {"train", "sample"}


def test_no_imports_in_a_circle():
    done = set()

    def visit(name, way):
        assert name not in way, " imports ".join([*way[way.index(name):], name])
        if name not in done:
            for other in sorted(GRAPH[name]):
                visit(other, [*way, name])
            done.add(name)
    for name in GRAPH:
        visit(name, [])


def test_an_experiment_imports_no_neighbour_but_results():
    """So there are two floors."""
    for file in OUTER:
        assert {name for name in imports(file) if area(name) == 3} <= {"experiments.results"}, file
    assert not imports(ROOT / "experiments/results.py") & {f"experiments.{file.stem}" for file in OUTER}


@pytest.mark.parametrize("name", FILES)
def test_no_file_touches_the_search_path(name):
    """Scripts start in the repository's root: python train.py, python -m experiments.NAME."""
    tree = ast.parse(FILES[name].read_text(encoding="utf-8"))
    touched = [node for node in ast.walk(tree) if isinstance(node, ast.Attribute) and node.attr == "path"
               and isinstance(node.value, ast.Name) and node.value.id == "sys"]
    taken = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.module == "sys"
             and any(alias.name == "path" for alias in node.names)]
    assert not touched and not taken
    if name != "tests.test_layout":                      # nor does a text that it might run
        assert "sys." + "path" not in FILES[name].read_text(encoding="utf-8")


# ---- Sizes -----------------------------------------------------------------------------------------------------------

def lines(file):
    return file.read_text(encoding="utf-8").splitlines()


def total(files):
    return sum(len(lines(file)) for file in files)


MOST = {"l2d.py": 1050, "train.py": 300, "sample.py": 140, "README.md": 160, "experiments/README.md": 400}


@pytest.mark.parametrize("name", MOST)
def test_no_file_is_too_long(name):
    assert total([ROOT / name]) <= MOST[name]


def test_support_is_small():
    assert total(file for file in OWN if file.parent.name == "support") <= 600


def test_experiments_are_small():
    assert total(OUTER) <= 2500


def test_experiments_are_few():
    assert sum(len(lines(file)) > 0 for file in OUTER) <= 11


@pytest.mark.parametrize("file", OWN, ids=lambda file: file.name)
def test_no_line_is_too_long(file):
    assert not [f"{file.name}:{n}: {len(line)} characters" for n, line in enumerate(lines(file), start=1) if len(line) > 100]
