"""``report.html``: it tells what the report tells, needs nothing else, and nobody's text becomes markup."""

import base64
import copy
import hashlib
import json
import logging
import random
import re
import shutil
import subprocess
from dataclasses import replace
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path

import pytest
from conftest import tiny_model, token_rows

import hf_guidedquant
from hf_guidedquant import GuidedQuantConfig
from hf_guidedquant.cli import main
from hf_guidedquant.errors import CheckpointError
from hf_guidedquant.page import report_page, write_page
from hf_guidedquant.page.drawings import grid_of
from hf_guidedquant.report import REPORT_FILE, load_report
from hf_guidedquant.training import BlockReport, DistillReport, ReconstructReport

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
VOID = {"meta", "link", "img", "input", "br", "hr", "base"}
HOSTILE = "</td></title><script>alert(1)</script><img src=x onerror=alert(1)>\"' style=x"


class Page(HTMLParser):
    """A page's elements, checked to be closed in order, and its texts."""

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.texts, self.inside = [], [], [], {"script": "", "style": ""}
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] in self.inside:
            self.inside[self.open[-1]] += data
        elif data.strip():
            self.texts.append(data.strip())

    def cells(self, text):
        """The body rows of the table of layers."""
        table = text.partition('class="layers"')[2].partition("</table>")[0].partition("<tbody>")[2]
        return [re.findall(r"<td[^>]*>(.*?)</td>", row) for row in re.findall(r"<tr>(.*?)</tr>", table)]


@pytest.fixture(scope="module")
def model():
    config = GuidedQuantConfig(bits=2, dataset=token_rows(), overrides={"*.down_proj": {"bits": 3}})
    return hf_guidedquant.quantize(tiny_model(), config)


@pytest.fixture
def report(model):
    return copy.deepcopy(model.quantization_report)


def trained(report):
    """The report as if its model had been trained."""
    blocks = tuple(BlockReport(f"model.layers.{n}", 0.25 * (n + 1), 0.125 * (n + 1), 0.02) for n in range(2))
    distilled = DistillReport((0.5, 0.25, 0.125), (0.75, 0.5, 0.375, 0.5), 2, 4)
    return replace(report, reconstruction=ReconstructReport(blocks), distillation=distilled)


def saved(report, folder):
    folder.mkdir(exist_ok=True)
    report.save(folder)
    return folder


def test_every_layer_is_told_with_its_numbers(report):
    text = report_page(report)
    rows = Page(text).cells(text)
    assert [row[0] for row in rows] == [layer.plan.name for layer in report.layers]
    for row, layer in zip(rows, report.layers, strict=True):
        assert [int(cell) for cell in row[1:4]] == [layer.plan.out_features, layer.plan.in_features, layer.plan.bits]
        for value in layer.objectives.values():
            assert f"{value:.3e}" in row


def test_the_summary_is_told(report):
    report.measured |= {"perplexity on held-out text": 23.123456, "tasks": {"piqa": 0.5}}
    texts = Page(report_page(report)).texts
    settings = report.settings
    for told in (
        "LlamaForCausalLM",
        f"{report.bits_per_weight:.3f}",
        f"{report.quantized_bytes / 1e6:,.1f} MB",
        "23.123",
        '{"piqa": 0.5}',
        settings["provenance"]["sha256"],
        "token rows: 8 rows, 264 tokens, seed 0",
        *report.seconds,
    ):
        assert told in texts, told
    assert any(text.startswith("torch ") or ", torch " in text for text in texts)


def test_the_map_has_a_cell_for_every_layer_in_one_scale(report):
    text = report_page(report)
    maps = re.findall(r'<table class="map">(.*?)</table>', text)
    assert [each.count("<td") for each in maps] == [14, 14]
    ends = [{layer.plan.name: [*layer.objectives.values()][end] for layer in report.layers} for end in (0, -1)]
    pairs = [(value, end, name) for end in (0, 1) for name, value in ends[end].items()]
    for (value, end, name), level in ((max(pairs), "h11"), (min(pairs), "h0")):
        block, module = re.fullmatch(r"model\.layers\.(\d+)\.(.+)", name).groups()
        assert f'<td class="{level}" title="{module}, block {block}: {value:.4g}">' in maps[end]


def test_experts_are_one_line_with_their_mean(report):
    layer = report.layers[0]
    layers = [
        replace(layer, plan=replace(layer.plan, name=f"model.layers.0.mlp.experts.{n}.up_proj"), objectives={"lnq": n})
        for n in (1, 3)
    ]
    assert grid_of({x.plan.name: x.objectives["lnq"] for x in layers}) == {("mlp.experts.*.up_proj", "0"): 2.0}


@pytest.mark.parametrize("value", [0.0, float("nan"), float("inf")])
def test_objectives_that_have_no_logarithm(report, value):
    layers = [replace(layer, objectives={"lnq": value}) for layer in report.layers]
    Page(report_page(replace(report, layers=layers)))


def test_bits_are_mapped_where_they_differ(report):
    text = report_page(report)
    (bits,) = re.findall(r'<table class="map bits">(.*?)</table>', text)
    assert re.findall(r'class="b(\d)" title="mlp.down_proj, block (\d): (\d)">(\d)<', bits) == [
        ("3", "0", "3", "3"),
        ("3", "1", "3", "3"),
    ]
    shares = [x.plan.weights for x in report.layers if x.plan.bits == 3]
    assert f"{sum(shares) / sum(x.plan.weights for x in report.layers):.1%} of the weights at 3 bits" in text
    alike = [replace(layer, plan=replace(layer.plan, bits=2)) for layer in report.layers]
    assert "Bits per layer" not in report_page(replace(report, layers=alike))


def test_training_is_drawn_to_scale(report):
    assert "Trained block by block" not in report_page(report) and "Distilled" not in report_page(report)
    done = trained(report)
    text = report_page(done)
    assert done.reconstruction.describe().replace(">", "&gt;") in text
    assert done.distillation.describe().replace(">", "&gt;") in text
    points = {
        told: (float(x), float(y))
        for x, y, told in re.findall(r'<circle cx="([\d.]+)" cy="([\d.]+)"[^>]*><title>([^<]+)', text)
    }
    assert len(points) == 4 + 7
    curve = [points[f"rows held back, epoch {n}: {v:.5g}"] for n, v in enumerate(done.distillation.held_back)]
    # Equal steps of the number are equal steps on the page, up to its tenths.
    across = [b[0] - a[0] for a, b in pairwise(curve)]
    assert max(across) - min(across) <= 0.2 and min(across) > 50
    up = (curve[0][1] - curve[1][1]) / 0.25
    assert abs((curve[1][1] - curve[2][1]) / 0.125 - up) <= 0.2 / 0.125 and up < -50


def test_what_statistics_needed_is_told(report):
    assert "no Hessian had to be repaired" in report_page(report)
    layer = replace(report.layers[3], damping=1e-4, dead_inputs=7, fallback="of some reason", bad_rows=2)
    text = report_page(replace(report, layers=[*report.layers[:3], layer]))
    for note in ("7 inputs that never", "damped by 1e-04", "fallback: of some reason", "2 calibration rows left out"):
        assert text.count(f"{layer.plan.name}: {note}") == 1 and text.count(note) == 2


def test_the_page_needs_nothing_else(report):
    text = report_page(trained(report))
    found = Page(text)
    for tag, attributes in found.tags:
        assert tag not in {"link", "img", "iframe", "object", "embed", "base", "form", "a", "audio", "video"}
        assert not {name for name in attributes if name.startswith("on") or name in ("src", "href", "style", "action")}
    assert "url(" not in found.inside["style"] and "@import" not in found.inside["style"]
    policies = [attrs["content"] for tag, attrs in found.tags if attrs.get("http-equiv") == "Content-Security-Policy"]
    hashes = [base64.b64encode(hashlib.sha256(found.inside[k].encode()).digest()).decode() for k in ("style", "script")]
    assert policies == [f"default-src 'none'; style-src 'sha256-{hashes[0]}'; script-src 'sha256-{hashes[1]}'"]


def hostile(report):
    """The report with a stranger's text wherever a text can be."""
    told = json.loads(json.dumps(trained(report).to_dict()))

    def infect(value):
        if isinstance(value, str):
            return HOSTILE + value
        if isinstance(value, dict):
            return {HOSTILE + key: infect(entry) for key, entry in value.items()}
        return [infect(entry) for entry in value] if isinstance(value, list) else value

    for key in ("skipped", "seconds"):
        told[key] = infect(told[key])
    told["model"] = HOSTILE
    told["measured"] = {HOSTILE: HOSTILE, HOSTILE + "2": 1.5}
    told["settings"] = {key: infect(value) for key, value in told["settings"].items()} | infect(told["settings"])
    told["settings"]["provenance"] = {"base_model": HOSTILE, "calibration": HOSTILE, "versions": {HOSTILE: HOSTILE}}
    for layer in told["layers"]:
        layer |= {"name": HOSTILE + layer["name"], "method": HOSTILE, "fallback": HOSTILE, "lut_dtype": HOSTILE}
        layer["objectives"] = {HOSTILE + stage: value for stage, value in layer["objectives"].items()}
    return told


def test_nobodys_text_becomes_markup(report, tmp_path):
    (tmp_path / REPORT_FILE).write_text(json.dumps(hostile(report)))
    plain, infected = Page(report_page(trained(report))), Page(report_page(tmp_path))
    assert infected.inside == plain.inside
    assert {tag for tag, _ in infected.tags} <= {tag for tag, _ in plain.tags} | {"b"}
    names = {name for _, attributes in plain.tags for name in attributes}
    assert {name for _, attributes in infected.tags for name in attributes} <= names
    assert sum(HOSTILE in text for text in infected.texts) > 40


def test_control_characters_and_lone_surrogates_are_shown_escaped(report, tmp_path):
    report = replace(report, model="a\x1b\u202e\ud800b")
    text = write_page(report, tmp_path / "page.html").read_text(encoding="utf-8")
    assert "a\\x1b\\u202e\\ud800b" in text and not {"\x1b", "\u202e"} & set(text)


@pytest.mark.parametrize("with_training", [False, True])
def test_a_saved_report_is_read_as_it_was(report, with_training, tmp_path):
    report = trained(report) if with_training else report
    assert load_report(saved(report, tmp_path / "m")) == report


def test_keys_of_another_version_are_passed_over(report, tmp_path):
    told = json.loads(json.dumps(report.to_dict()))
    told["new"] = told["layers"][0]["new"] = 1
    for layer in told["layers"]:
        del layer["lut_dtype"]
    (tmp_path / REPORT_FILE).write_text(json.dumps(told))
    assert load_report(tmp_path) == report


def places(value, path=()):
    """Paths to everything in a JSON value."""
    yield path
    entries = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, entry in entries:
        yield from places(entry, (*path, key))


def test_a_report_that_makes_no_sense_is_an_error_of_ours(report, tmp_path):
    told = json.loads(json.dumps({**trained(report).to_dict(), "layers": trained(report).to_dict()["layers"][:2]}))
    rng = random.Random(0)
    others = [None, True, -1, 0, 10**400, 1.5, float("nan"), float("-inf"), "x", [], {}, [[]], {"x": None}]
    refused = 0
    for path in (path for path in places(told) if path):
        for other in rng.sample(others, 3):
            changed = copy.deepcopy(told)
            parent = changed
            for key in path[:-1]:
                parent = parent[key]
            parent[path[-1]] = other
            (tmp_path / REPORT_FILE).write_text(json.dumps(changed))
            try:
                Page(report_page(tmp_path))
            except CheckpointError:
                refused += 1
    assert refused > 50


def test_a_page_is_written_where_it_is_wanted(report, tmp_path, monkeypatch, capsys):
    folder = saved(report, tmp_path / "m")
    monkeypatch.chdir(tmp_path)
    expected = report_page(report)
    assert write_page(folder) == folder / "report.html"
    assert write_page(report) == Path("report.html")
    assert main(["report", str(folder), "--out", "other.html"]) == 0
    assert capsys.readouterr().out == "Written to other.html.\n"
    for file in (folder / "report.html", tmp_path / "report.html", tmp_path / "other.html"):
        assert file.read_text(encoding="utf-8") == expected
    assert main(["report", str(tmp_path / "none")]) == 1
    assert "no readable report" in capsys.readouterr().err


def test_a_run_leaves_its_page_in_its_folder(tmp_path, caplog):
    config = GuidedQuantConfig(bits=2, method="squeezellm", dataset=token_rows(), run_dir=tmp_path)
    model = hf_guidedquant.quantize(tiny_model(), config)
    assert (tmp_path / "report.html").read_text(encoding="utf-8") == report_page(model.quantization_report)
    (tmp_path / "report.html").unlink()
    (tmp_path / "report.html").mkdir()
    with caplog.at_level(logging.WARNING, "hf_guidedquant"):
        again = hf_guidedquant.quantize(tiny_model(), config)
    assert "report.html cannot be written" in caplog.text
    assert [layer.objectives for layer in again.quantization_report.layers] == [
        layer.objectives for layer in model.quantization_report.layers
    ]


def test_a_link_in_place_of_the_page_is_not_written_through(report, tmp_path):
    victim = tmp_path / "victim"
    victim.write_text("somebody's")
    folder = saved(report, tmp_path / "m")
    (folder / "report.html").symlink_to(victim)
    assert write_page(folder).read_text(encoding="utf-8") == report_page(report)
    assert victim.read_text() == "somebody's"
    assert {file.name for file in folder.iterdir()} == {"report.html", REPORT_FILE}


def browse(file, folder):
    """The page as a browser leaves it, what its console said, and what the page asked the network for."""
    log = folder / "net.json"
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--host-resolver-rules=MAP * ~NOTFOUND"]
    options += [f"--user-data-dir={folder / 'profile'}", "--enable-logging=stderr", f"--log-net-log={log}"]
    done = subprocess.run([BROWSER, *options, "--dump-dom", file.as_uri()], capture_output=True, timeout=120)
    assert done.returncode == 0
    console = re.findall(r"CONSOLE[^ ]* (.*)", done.stderr.decode(errors="replace"))
    asked = [event.get("params", {}) for event in json.loads(log.read_text())["events"]]
    # The browser's own requests come from no page.
    asked = {p["url"] for p in asked if "url" in p and p.get("initiator", "not an origin") != "not an origin"}
    return done.stdout.decode(), console, asked - {file.as_uri()}


@pytest.mark.skipif(BROWSER is None, reason="needs chromium")
def test_a_browser_has_nothing_to_say_and_asks_for_nothing(report, tmp_path):
    noisy = tmp_path / "noisy.html"
    noisy.write_text('<!doctype html><img src="http://example.org/x.png"><script>none.x</script>')
    _, console, asked = browse(noisy, tmp_path)
    assert len(console) == 1 and asked == {"http://example.org/x.png"}
    (tmp_path / REPORT_FILE).write_text(json.dumps(hostile(report)))
    for source in (trained(report), tmp_path):
        shown, console, asked = browse(write_page(source, tmp_path / "page.html"), tmp_path)
        assert (console, asked) == ([], set())
        # The script has run: names of columns have become buttons.
        assert 0 < shown.count("<button>") == shown.partition('"layers"')[2].partition("<tbody>")[0].count("<th ")


@pytest.mark.skipif(BROWSER is None, reason="needs chromium")
def test_a_click_sorts_the_layers(report, tmp_path):
    values = [3e-2, 1e-3, 2e1]
    layers = [replace(x, objectives={"lnq": v}) for x, v in zip(report.layers[:3], values, strict=True)]
    layers.append(replace(report.layers[3], objectives={}))
    text = report_page(replace(report, layers=layers))
    names = [layer.plan.name for layer in layers]
    for clicks, order in ((1, [2, 0, 1, 3]), (2, [1, 0, 2, 3])):
        click = f"for (let i = 0; i < {clicks}; i++) document.querySelectorAll('.layers button')[6].click();"
        clicked = re.sub(r'<meta http-equiv="Content-Security-Policy"[^>]*>', "", text)
        file = tmp_path / "page.html"
        file.write_text(clicked.replace("</body>", f"<script>{click}</script></body>"), encoding="utf-8")
        shown, console, _ = browse(file, tmp_path)
        assert console == []
        assert re.findall(r"<td>(model\.[^<]+)</td>", shown) == [names[index] for index in order]
