"""The package's own lines: none runs data as code, ends the process, or talks on the terminal."""

import ast

import pytest
from victim import PACKAGE_FILES, ROOT

BANNED_CALLS = {"eval", "exec", "exit", "quit", "input", "print", "torch.load", "sys.exit", "os._exit"}
BANNED_MODULES = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "joblib", "marshal", "shelve"}


def banned(source: str) -> list[str]:
    """What a source file does that a library must not: run data as code, end the process, talk on the terminal."""
    found = []
    for node in ast.walk(ast.parse(source)):
        names = []
        if isinstance(node, ast.Name | ast.Attribute):
            names = [ast.unparse(node)]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [node.module or "", *(f"{node.module}.{alias.name}" for alias in node.names)]
        elif isinstance(node, ast.ExceptHandler) and node.type is None:
            names = ["bare except"]
        what = {*BANNED_CALLS, *BANNED_MODULES, "bare except"}
        found += [f"line {node.lineno}: {n}" for n in names if n in what or n.partition(".")[0] in BANNED_MODULES]
    return found


# Published checkpoints may be pickles, which are read as tensors and nothing else.
READER = ROOT / "src" / "hf_guidedquant" / "weights.py"
READS_PICKLES = {"torch.load", "pickle", "pickle.UnpicklingError"}


@pytest.mark.parametrize("file", PACKAGE_FILES, ids=lambda file: str(file.relative_to(ROOT)))
def test_the_package_neither_runs_data_nor_exits_nor_prints(file):
    found = banned(file.read_text(encoding="utf-8"))
    allowed = READS_PICKLES if file == READER else set()
    assert [what for what in found if what.partition(": ")[2] not in allowed] == []


def test_pickles_are_read_in_one_place_and_as_tensors_only():
    calls = [node for node in ast.walk(ast.parse(READER.read_text(encoding="utf-8"))) if isinstance(node, ast.Call)]
    (load,) = [call for call in calls if ast.unparse(call.func) == "torch.load"]
    assert {keyword.arg: ast.unparse(keyword.value) for keyword in load.keywords}["weights_only"] == "True"


@pytest.mark.parametrize(
    "source",
    [
        "torch.load(path)",
        "from torch import load",
        "import pickle",
        "from pickle import loads",
        "import joblib.memory",
        "eval(text)",
        "run = exec",
        "exit(1)",
        "sys.exit()",
        "input()",
        "print(1)",
        "try:\n    f()\nexcept:\n    pass",
    ],
)
def test_the_ban_finds(source):
    assert banned(source)


def test_the_ban_lets_harmless_code_pass():
    assert banned("model.eval()\nload(path)\n'print(1)'\ntry:\n    f()\nexcept OSError:\n    pass") == []
