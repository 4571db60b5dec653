"""The documentation: its Python runs, its commands parse; its links, figures and names of errors are real."""

import ast
import inspect
import json
import re
import shutil
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from test_importer import Published
from test_vision_language import made
from tokenizer import word_tokenizer
from transformers import CLIPImageProcessor, LlamaConfig, LlamaForCausalLM, LlavaProcessor

import hf_guidedquant
from hf_guidedquant import GuidedQuantConfig, cli, errors

ROOT = Path(__file__).parent.parent
PAGES = {str(page.relative_to(ROOT)): page for page in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))}
OTHERS = [ROOT / "SECURITY.md", ROOT / "benchmarks/results/README.md", ROOT / "triton_kernels/README.md"]
BASE = "HuggingFaceTB/SmolLM2-135M-Instruct"
# What a snippet needs that a machine may not have. Several processes are what test_workers.py is about.
NEEDS = {
    "LOCAL_RANK": False,
    "from peft": find_spec("peft") is not None,
    "fisher_map": find_spec("matplotlib") is not None,
}


def text_of(page):
    return PAGES[page].read_text(encoding="utf-8")


def snippets(page):
    return re.findall(r"```python\n(.*?)```", text_of(page), re.DOTALL)


@pytest.fixture(scope="module")
def stand_ins(tmp_path_factory):
    """A folder with tiny models under the names that the pages use."""
    folder = tmp_path_factory.mktemp("docs")
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_hidden_layers": 2}
    torch.manual_seed(0)
    # More words than the tokenizer has: a snippet takes ids at will.
    model = LlamaForCausalLM(LlamaConfig(**sizes, vocab_size=256, max_position_embeddings=512, eos_token_id=1)).eval()
    tokenizer = word_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}<s> {{ m['content'] }} {% endfor %}"
    for name in (BASE, "SmolLM2-135M"):
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    seeing, _ = made("llava")
    seeing.save_pretrained(folder / "Qwen/Qwen2-VL-2B-Instruct")
    LlavaProcessor(CLIPImageProcessor(), tokenizer, patch_size=8).save_pretrained(folder / "Qwen/Qwen2-VL-2B-Instruct")
    (folder / "OWNER").mkdir()
    Published(LlamaForCausalLM(LlamaConfig(**sizes, vocab_size=256))).write(folder / "OWNER/ANY-PRECISION-MODEL")
    (folder / "examples").mkdir()
    (folder / "examples/held_out.txt").write_text("word1 word2 word3 " * 400, encoding="utf-8")
    quantized = hf_guidedquant.quantize(model, GuidedQuantConfig(bits=3, method="rtn"))
    hf_guidedquant.save(quantized, folder / "SmolLM2-3bit", tokenizer)
    return folder


@pytest.mark.parametrize("page", PAGES)
def test_snippets_run(page, stand_ins, tmp_path, monkeypatch):
    """In order, each with what those before it have left, as a reader would type them."""
    shutil.copytree(stand_ins, tmp_path / "here")
    monkeypatch.chdir(tmp_path / "here")
    if 'save(model, "SmolLM2-3bit"' in text_of(page):
        shutil.rmtree("SmolLM2-3bit")
    names: dict = {}
    for number, snippet in enumerate(snippets(page)):
        if all(there for mark, there in NEEDS.items() if mark in snippet):
            exec(compile(snippet, f"{page}, snippet {number}", "exec"), names)


@pytest.mark.parametrize("page", PAGES)
def test_snippets_name_only_what_exists(page):
    for snippet in snippets(page):
        for node in ast.walk(ast.parse(snippet)):
            if (
                isinstance(node, ast.Attribute)
                and isinstance(node.value, ast.Name)
                and node.value.id == "hf_guidedquant"
            ):
                assert hasattr(hf_guidedquant, node.attr)


def test_every_snippet_but_one_runs_somewhere():
    everywhere = [snippet for page in PAGES for snippet in snippets(page)]
    assert sum("LOCAL_RANK" in snippet for snippet in everywhere) == 1 and len(everywhere) > 15


@pytest.mark.parametrize("page", PAGES)
def test_commands_are_valid(page):
    commands = re.findall(r"^python -m hf_guidedquant (.+)$", text_of(page).replace("\\\n", " "), re.MULTILINE)
    for command in commands:
        cli._parser("").parse_args(command.partition("#")[0].split())
    if page == "README.md":
        assert {command.split()[0] for command in commands} == cli._COMMANDS.keys()


def test_the_servers_command_line_is_there():
    code = re.search(r'^python -c "(.+?)" serve', text_of("docs/recipes.md"), re.MULTILINE)[1]
    module, name = re.search(r"from (\S+) import (\w+)", code).groups()
    assert ast.parse(code) and find_spec(module) is not None and name == "main"


def test_the_settings_table_gives_the_real_defaults():
    rows = re.findall(r"^\| (`.*?`) \| (.*?) \|", text_of("README.md"), re.MULTILINE)
    defaults = {field: default for fields, default in rows for field in re.findall(r"`(\w+)`", fields)}
    config = GuidedQuantConfig()
    single = ("bits", "method", "guided", "num_groups", "output_curvature", "dataset", "assistant_only_loss", "distill")
    for field in (*single, "cache_dequantized", "fuse_layers"):
        assert ast.literal_eval(defaults[field].strip("`")) == getattr(config, field), field
    assert defaults["num_samples"] == f"{config.num_samples}, {config.seq_len}, {config.seed}"
    assert defaults["lnq_iterations"] == f"{config.lnq_sweeps}, {config.lnq_iterations}, {config.lnq_cycles}"


def anchors(page):
    """The anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", [*PAGES.values(), *OTHERS], ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    for target, anchor in re.findall(r"\]\((?!https?:)([^)#]*)(?:#([^)]+))?\)", page.read_text(encoding="utf-8")):
        there = page.parent / target if target else page
        assert there.exists(), target
        assert not anchor or anchor in anchors(there), anchor


ERRORS = [name for name, value in vars(errors).items() if inspect.isclass(value) and issubclass(value, Exception)]


def test_every_error_has_a_cause_and_a_remedy():
    table = text_of("docs/troubleshooting.md").partition("## Errors")[2].partition("\n## ")[0]
    rows = re.findall(r"^\| `(\w+)` \| (.+?) \| (.+?) \|$", table, re.MULTILINE)
    assert len(ERRORS) > 20
    assert sorted(name for name, _, _ in rows) == sorted(ERRORS)
    assert all(len(cause) > 10 and len(remedy) > 10 for _, cause, remedy in rows)


def test_the_figures_are_those_of_the_results():
    measured = json.loads((ROOT / "benchmarks/results/quality-smollm2-h100.json").read_text())["results"]
    rows = re.findall(
        r"^\| (\d) \| ([\w +]+) \| ([\d.]+) \| ([\d.]+) \| ([\d.]+) \|$", text_of("docs/methods.md"), re.M
    )
    expected = [
        (
            x["bits"],
            x["method"],
            f"{x['perplexity']:.2f}",
            f"{x['bits_per_weight']:.3f}",
            f"{x['seconds']['total']:.1f}",
        )
        for x in measured
    ]
    assert [(int(bits), *rest) for bits, *rest in rows] == expected


def test_every_guarantee_is_checked_by_tests_that_exist():
    guarantees = (ROOT / "SECURITY.md").read_text(encoding="utf-8").partition("## What is guaranteed")[2]
    rows = re.findall(r"^\| (.+) \| (.+) \|$", guarantees.partition("\n## ")[0], re.MULTILINE)
    sources = [path.read_text(encoding="utf-8") for path in (ROOT / "tests").rglob("test_*.py")]
    tests = {name for source in sources for name in re.findall(r"^def (test_\w+)", source, re.MULTILINE)}
    assert len(rows) > 10
    for guarantee, named in rows:
        names = re.findall(r"`(test_\w+)`", named)
        assert names and set(names) <= tests, guarantee
