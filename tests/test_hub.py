"""Pushing to and loading from the Hub, played by a server on this machine (see hub_server.py)."""

import json
import subprocess
import sys
from types import SimpleNamespace

import pytest
from conftest import tiny_model
from hub_server import TOKEN, HubServer, Repository
from tokenizer import texts, word_tokenizer

CANARY = "CanaryOfTheTexts"
OWN_CARD = b"---\nlicense: mit\n---\n\n# My own words\n"

PUBLISH = """
import json, sys
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
import hf_guidedquant

folder, texts = sys.argv[1], json.loads(sys.argv[2])
config = hf_guidedquant.GuidedQuantConfig(bits=3, dataset=texts, seq_len=32, num_samples=4)
ids = torch.arange(3, 40)[None]

def observe(model):
    with torch.no_grad():
        generated = model.generate(ids, max_new_tokens=12, min_new_tokens=12, do_sample=False)
        return {"logits": model(ids).logits.tolist(), "tokens": generated.tolist()}

def push(name, **options):
    try:
        model.push_to_hub(name, **options)
        return None
    except Exception as error:
        return f"{type(error).__name__}: {error}"

tokenizer = AutoTokenizer.from_pretrained("me/base")
model = AutoModelForCausalLM.from_pretrained("me/base", quantization_config=config)
seen = observe(model)
seen["provenance"] = model.config.quantization_config.provenance
model.push_to_hub("me/x", max_shard_size="60KB", tags=["my-tag"])
tokenizer.push_to_hub("me/x")
seen["own"] = push("me/own")
seen["pull request"] = push("me/proposed", create_pr=True)
seen["branch"] = push("me/branched", revision="v2")

model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=config)
seen["local"] = push("me/local")
model.save_pretrained(f"{folder}/../saved", push_to_hub=True, repo_id="me/saved")
print(json.dumps(seen))
"""

# Loads the model with the code of its own card, and nothing else.
RELOAD = """
import json, re
import torch
from huggingface_hub import hf_hub_download
from transformers import AutoModelForCausalLM

card = open(hf_hub_download("me/x", "README.md"), encoding="utf-8").read()
names = {}
exec(re.search("```python\\n(.*?)```", card, re.DOTALL)[1], names)
ids = torch.arange(3, 40)[None]
prompt = names["generator"].tokenizer.decode(ids[0])
options = {"max_new_tokens": 12, "min_new_tokens": 12, "do_sample": False, "return_tensors": True}
tokens = names["generator"](prompt, **options)[0]["generated_token_ids"]
model = AutoModelForCausalLM.from_pretrained("me/x")
with torch.no_grad():
    logits = model(ids).logits.tolist()
model.push_to_hub("me/again", max_shard_size="60KB")
print(json.dumps({"logits": logits, "tokens": [list(map(int, tokens))]}))
"""


def run(script: str, *arguments: str, **options) -> dict:
    """What a Python process prints as its last line of standard output, read as JSON."""
    command = [sys.executable, "-c", script, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, **options)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    """The server after one process has quantized and pushed, and what that process saw."""
    folder = tmp_path_factory.mktemp("CanaryOfTheFolder") / "model"
    tiny_model().save_pretrained(folder)
    word_tokenizer().save_pretrained(folder)
    with HubServer() as server:
        server.add_folder("me/base", folder)
        server.repositories["me/own"] = Repository()
        server.repositories["me/own"].add("main", {"README.md": OWN_CARD})
        environment = server.environment(tmp_path_factory.mktemp("home"))
        published = run(PUBLISH, str(folder), json.dumps([*texts(), CANARY]), env=environment)
        # A home of its own: nothing that the first process left in its cache can help.
        reloaded = run(RELOAD, env=server.environment(tmp_path_factory.mktemp("other_home")))
        yield SimpleNamespace(server=server, published=published, reloaded=reloaded)


def card(hub, name: str, revision: str = "main") -> str:
    return hub.server.find(name).files(revision)["README.md"].decode()


def test_a_pushed_model_loads_in_another_process_with_the_same_logits(hub):
    assert hub.reloaded["logits"] == hub.published["logits"]


def test_the_code_on_the_card_generates_the_tokens_of_the_model_that_was_pushed(hub):
    assert hub.reloaded["tokens"] == hub.published["tokens"]


def test_shards_and_their_index_are_uploaded(hub):
    files = hub.server.find("me/x").files()
    assert sum(name.endswith(".safetensors") for name in files) > 1
    assert {"model.safetensors.index.json", "config.json", "guidedquant_report.json", "tokenizer.json"} <= files.keys()


def test_the_card_tells_import_tags_and_base(hub):
    text = card(hub, "me/x")
    front = text.split("---")[1]
    assert "import hf_guidedquant" in text
    assert 'model="me/x"' in text
    assert "base_model: me/base" in front
    assert all(f"- {tag}\n" in front for tag in ("guidedquant", "3-bit", "my-tag"))


def test_texts_are_read_with_the_tokenizer_of_the_hub_model(hub):
    provenance = hub.published["provenance"]
    assert provenance["base_model"] == "me/base"
    assert provenance["calibration"] == "texts"
    assert provenance["rows"] == 4


def test_a_model_from_a_folder_names_no_base(hub):
    assert hub.published["local"] is None
    assert "base_model" not in card(hub, "me/local")
    assert "import hf_guidedquant" in card(hub, "me/local")


def test_saving_and_pushing_in_one_call_uploads_card_and_report(hub):
    assert {"README.md", "guidedquant_report.json", "model.safetensors"} <= hub.server.find("me/saved").files().keys()
    assert "import hf_guidedquant" in card(hub, "me/saved")


def test_a_users_own_card_is_kept(hub):
    assert hub.published["own"] is None
    files = hub.server.find("me/own").files()
    assert files["README.md"] == OWN_CARD
    assert "model.safetensors" in files


def test_a_loaded_model_can_be_pushed_again(hub):
    first, again = (hub.server.find(name).files() for name in ("me/x", "me/again"))
    shards = {name for name in first if name.endswith(".safetensors")}
    assert {name: again[name] for name in shards} == {name: first[name] for name in shards}
    assert "base_model: me/base" in card(hub, "me/again")


def test_a_pull_request_leaves_the_main_branch_alone(hub):
    assert hub.published["pull request"] is None
    assert "model.safetensors" in hub.server.find("me/proposed").files("refs/pr/1")
    assert hub.server.find("me/proposed").files("main") == {}


def test_a_push_to_a_new_branch_arrives_there_with_our_card(hub):
    assert hub.published["branch"] is None
    assert "model.safetensors" in hub.server.find("me/branched").files("v2")
    assert "import hf_guidedquant" in card(hub, "me/branched", "v2")
    assert hub.server.find("me/branched").files("main") == {}


def test_no_upload_holds_the_token_a_path_or_the_calibration_texts(hub):
    secrets = {"token": TOKEN, "folder": "CanaryOfTheFolder", "text": CANARY, "first text": texts()[0][:30]}
    leaks = [
        (name, revision, path, what)
        for name, repository in hub.server.repositories.items()
        if name != "me/base"
        for revision in repository.heads
        for path, content in repository.files(revision).items()
        for what, secret in secrets.items()
        if secret.encode() in content
    ]
    assert leaks == []


def test_the_stand_in_knows_every_request(hub):
    assert hub.server.unhandled == []
    assert ("POST", "/api/repos/create") in hub.server.log
