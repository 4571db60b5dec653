"""The package's shape: rooms know earlier rooms only, and the installed names are ours."""

import ast
import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

import hf_guidedquant

SOURCE = Path(hf_guidedquant.__file__).parent

# A room may import from the rooms before it. `formats` and `solvers` never import each other.
ROOMS = [
    "errors",
    "auto",
    "resources",
    "running",
    "fingerprint",
    "layer_folder",
    "codes",
    "linears",
    "replay",
    "triton_kernels",
    "decoding",
    "solvers",
    "config",
    "formats",
    "workers",
    "experts",
    "plan",
    "calibration",
    "nn",
    "training",
    "allocate",
    "budget",
    "checkpoint",
    "report",
    "pictures",
    "page",
    "evaluate",
    "card",
    "checksums",
    "companions",
    "solving",
    "probe",
    "forecast",
    "trained_blocks",
    "distillation_folder",
    "run_folder",
    "pipeline",
    "lora",
    "quantizer",
    "inspection",
    "weights",
    "importer",
    "commands",
    "cli",
    "__main__",
]


def room_of(path):
    return path.relative_to(SOURCE).parts[0].removesuffix(".py")


def imported_rooms(path):
    """Rooms that a file imports by relative imports, wherever in the file they stand."""
    depth = len(path.relative_to(SOURCE).parts)
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.level == depth:
            names = [node.module] if node.module else [alias.name for alias in node.names]
            yield from (name.partition(".")[0] for name in names)
        elif isinstance(node, ast.Import | ast.ImportFrom):
            absolute = [node.module or ""] if isinstance(node, ast.ImportFrom) else [a.name for a in node.names]
            assert node.__dict__.get("level") or not any(name.startswith("hf_guidedquant") for name in absolute)


def test_rooms_import_only_earlier_rooms():
    files = [path for path in SOURCE.rglob("*.py") if path.parent != SOURCE or path.name != "__init__.py"]
    assert {room_of(path) for path in files} | {"triton_kernels"} == set(ROOMS)
    for path in files:
        room = room_of(path)
        for other in imported_rooms(path):
            assert ROOMS.index(other) < ROOMS.index(room), f"{path.name} imports {other}"
            assert {room, other} != {"formats", "solvers"}


def test_the_kernels_are_installed_under_our_name_only():
    assert importlib.util.find_spec("hf_guidedquant.triton_kernels") is not None
    code = "import importlib.util as u, sys; s = u.find_spec('triton_kernels'); sys.exit(bool(s and s.origin))"
    assert subprocess.run([sys.executable, "-c", code], cwd=SOURCE.parent.parent).returncode == 0


def test_the_package_imports_without_triton_optimum_or_datasets():
    code = (
        "import sys\n"
        "optional = ('triton', 'optimum', 'datasets', 'peft', 'gguf', 'lm_eval', 'matplotlib')\n"
        "sys.modules.update(dict.fromkeys(optional))\n"
        "import hf_guidedquant"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("configure", ["", "logging.basicConfig(format='app %(message)s')"])
@pytest.mark.parametrize("first", [True, False])
def test_messages_are_shown_once_by_us_or_by_the_applications_log(configure, first):
    steps = [configure, "import hf_guidedquant"] if first else ["import hf_guidedquant", configure]
    code = "\n".join(["import logging", *steps, "logging.getLogger('hf_guidedquant.x').warning('hello')"])
    shown = subprocess.run([sys.executable, "-c", code], check=True, stderr=subprocess.PIPE, text=True).stderr
    assert shown.strip() == ("app hello" if configure else "[guidedquant] hello")
