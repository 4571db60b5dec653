"""The README's Python is valid, and speaks of things that exist."""

import ast
import re
from pathlib import Path

import pytest

import hf_guidedquant
from hf_guidedquant import GuidedQuantConfig, cli

ROOT = Path(__file__).parent.parent
SNIPPETS = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL)


@pytest.mark.parametrize("snippet", SNIPPETS, ids=range(len(SNIPPETS)))
def test_snippets_name_only_what_exists(snippet):
    for node in ast.walk(ast.parse(snippet)):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "hf_guidedquant":
            assert hasattr(hf_guidedquant, node.attr)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "GuidedQuantConfig":
            GuidedQuantConfig(**{keyword.arg: ast.literal_eval(keyword.value) for keyword in node.keywords})


def test_commands_are_valid():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    commands = re.findall(r"^python -m hf_guidedquant (.+)$", readme, re.MULTILINE)
    assert len(commands) == 8
    for command in commands:
        cli._parser("").parse_args(command.split())


def test_the_settings_table_gives_the_real_defaults():
    rows = re.findall(r"^\| (`.*?`) \| (.*?) \|", (ROOT / "README.md").read_text(encoding="utf-8"), re.MULTILINE)
    defaults = {field: default for fields, default in rows for field in re.findall(r"`(\w+)`", fields)}
    config = GuidedQuantConfig()
    single = ("bits", "method", "guided", "num_groups", "dataset", "assistant_only_loss", "distill")
    for field in (*single, "cache_dequantized", "fuse_layers"):
        assert ast.literal_eval(defaults[field].strip("`")) == getattr(config, field), field
    assert defaults["num_samples"] == f"{config.num_samples}, {config.seq_len}, {config.seed}"
    assert defaults["lnq_iterations"] == f"{config.lnq_iterations}, {config.lnq_cycles}"


def test_relative_links_lead_somewhere():
    for page in (
        ROOT / "README.md",
        ROOT / "SECURITY.md",
        ROOT / "benchmarks/results/README.md",
        ROOT / "triton_kernels/README.md",
    ):
        for target in re.findall(r"\]\((?!https?:)([^)#]+)\)", page.read_text(encoding="utf-8")):
            assert (page.parent / target).exists(), target


def test_every_guarantee_is_checked_by_tests_that_exist():
    guarantees = (ROOT / "SECURITY.md").read_text(encoding="utf-8").partition("## What is guaranteed")[2]
    rows = re.findall(r"^\| (.+) \| (.+) \|$", guarantees.partition("\n## ")[0], re.MULTILINE)
    sources = [path.read_text(encoding="utf-8") for path in (ROOT / "tests").rglob("test_*.py")]
    tests = {name for source in sources for name in re.findall(r"^def (test_\w+)", source, re.MULTILINE)}
    assert len(rows) > 10
    for guarantee, named in rows:
        names = re.findall(r"`(test_\w+)`", named)
        assert names and set(names) <= tests, guarantee
