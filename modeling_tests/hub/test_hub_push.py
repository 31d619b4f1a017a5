# SPDX-License-Identifier: Apache-2.0
"""Pushing to a Hub (a stub on the loopback interface) and loading from it in processes without this package."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch
from huggingface_hub import ModelCard
from PIL import Image
from safetensors.torch import load as load_tensors
from safetensors.torch import load_file
from stub_hub import StubHub, stub_hub


pytestmark = pytest.mark.slow

TEXTS = ["a red boat", "two dogs run over the green grass"]
PUSH = """
import tiny_models
model, processor = tiny_models.model("dinov2"), tiny_models.processor()
commit = model.push_to_hub("org/LLM2CLIP", processor=processor, license="apache-2.0", private=True)
print(commit.oid)
"""
# Everything a user does with a repository; the card's own code is run too.
LOAD = """
import sys
sys.modules["llm2clip_hf"] = None
import re
import torch
from PIL import Image
from safetensors.torch import save_file
from huggingface_hub import ModelCard
from transformers import AutoModel, AutoProcessor, pipeline

name, revision, texts = sys.argv[1], sys.argv[2], sys.argv[3].split("|")
model = AutoModel.from_pretrained(name, trust_remote_code=True, revision=revision)
processor = AutoProcessor.from_pretrained(name, trust_remote_code=True, revision=revision)
assert type(model).__module__.startswith("transformers_modules.")
with torch.no_grad():
    output = model(**processor(images=[Image.open("image.png")], text=texts))
save_file({"image": output.image_embeds, "text": output.text_embeds}, "outputs.safetensors")
blocks = re.findall(r"```python\\n(.*?)```", ModelCard.load(name).text, re.DOTALL)
assert blocks
for block in blocks:
    exec(block, {})
"""


@pytest.fixture(scope="module")
def hub() -> Iterator[StubHub]:
    with stub_hub() as server:
        yield server


@pytest.fixture(scope="module")
def pushed(hub: StubHub, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A private repository `org/LLM2CLIP` with a tiny model; its commit."""
    done = hub.run(PUSH, tmp_path_factory.mktemp("push"))
    return str(done.stdout.split()[-1])


def load(hub: StubHub, home: Path, name: str, revision: str = "main", **options: Any) -> Any:
    Image.new("RGB", (41, 35), (200, 30, 90)).save(home / "image.png")
    return hub.run(LOAD, home, name, revision, "|".join(TEXTS), **options)


def expected(model: Any) -> dict[str, torch.Tensor]:
    image = Image.new("RGB", (41, 35), (200, 30, 90))
    with torch.no_grad():
        output = model(**tiny_models.processor()(images=[image], text=TEXTS))
    return {"image": output.image_embeds, "text": output.text_embeds}


def assert_loaded(home: Path, model: Any) -> None:
    found = load_file(home / "outputs.safetensors")
    for name, value in expected(model).items():
        torch.testing.assert_close(found[name], value, atol=1e-6, rtol=1e-5)


def test_pushed_repository_holds_what_loads_and_no_pickles(hub: StubHub, pushed: str) -> None:
    repository = hub.repositories["org/LLM2CLIP"]
    files = repository.files()
    assert repository.private
    assert pushed == repository.branches["main"]
    assert len(repository.commits) == 2  # the empty one, and all of the push
    assert {Path(name).suffix for name in files} <= {".json", ".py", ".safetensors", ".md"}
    state = tiny_models.model("dinov2").state_dict()
    stored = load_tensors(files["model.safetensors"])
    assert all(torch.equal(stored[name], value) for name, value in state.items() if name in stored)
    card = ModelCard(files["README.md"].decode())
    assert (card.data.license, card.data.library_name) == ("apache-2.0", "transformers")
    assert card.data.pipeline_tag == "zero-shot-image-classification"


def test_repository_loads_by_revision_where_only_transformers_is(hub: StubHub, pushed: str, tmp_path: Path) -> None:
    load(hub, tmp_path, "org/LLM2CLIP", pushed)
    assert_loaded(tmp_path, tiny_models.model("dinov2"))


def test_private_repository_needs_a_token(hub: StubHub, pushed: str, tmp_path: Path) -> None:
    done = load(hub, tmp_path, "org/LLM2CLIP", token=None, check=False)
    assert done.returncode != 0
    assert "401" in done.stderr


FAILURES = """
import json, os, time, urllib.request
import tiny_models
from huggingface_hub import constants

model, found = tiny_models.model("dinov2", seed=5), {}  # weights that the Hub has not seen yet
time.sleep = lambda seconds: None  # between repeated requests

def attempt(name, *args, **kwargs):
    try:
        model.push_to_hub(*args, **kwargs)
        found[name] = "pushed"
    except (OSError, ValueError) as error:
        found[name] = f"{type(error).__name__}: {error}"

def switch(state):
    urllib.request.urlopen(f"{constants.ENDPOINT}/test/drop_uploads/{state}").read()

attempt("wrong token", "org/failures", token="hf_wrong")
attempt("new repository of others", "stranger/new")
attempt("repository of others", "stranger/LLM2CLIP")
token = os.environ.pop("HF_TOKEN")
attempt("no token", "org/failures")
os.environ["HF_TOKEN"] = token
switch("on")
attempt("interrupted", "org/interrupted")
switch("off")
attempt("again", "org/interrupted")

model.config.text_weights, model.config.text_base_model = "external", "some/folder/of/mine"
attempt("folder", "org/failures")
model.config.text_base_model = "org/missing-llm"
attempt("missing", "org/failures")
model.config.text_base_model = "org/llm"
attempt("external", "org/external")
found["pinned"] = model.config.text_base_revision
print(json.dumps(found))
"""


def test_failed_pushes_say_why_and_leave_nothing(hub: StubHub, tmp_path: Path) -> None:
    hub.add("stranger/LLM2CLIP", {"README.md": b"theirs"})
    commit = hub.add("org/llm", {"config.json": b"{}"})
    found = json.loads(hub.run(FAILURES, tmp_path).stdout.splitlines()[-1])
    assert found["no token"].startswith(
        "PermissionError: No token to push to 'org/failures' with. Run `hf auth login`"
    )
    assert "does not accept the token for 'org/failures' (401)" in found["wrong token"]
    for name in ("new repository of others", "repository of others"):
        assert re.search(
            r"PermissionError: The token may not write to 'stranger/\w+' \(403\).*create_pr=True", found[name]
        )
    assert hub.repositories["stranger/LLM2CLIP"].files() == {"README.md": b"theirs"}
    assert "ConnectionError: The connection broke while pushing to 'org/interrupted'" in found["interrupted"]
    assert "which is no repository on the Hub" in found["folder"]
    assert re.search("commit of the external LLM 'org/missing-llm'.*cannot be found out", found["missing"])
    assert "org/failures" not in hub.repositories

    interrupted = hub.repositories["org/interrupted"]
    assert found["again"] == "pushed"
    assert [sorted(files)[:1] for files in interrupted.commits.values()] == [[], ["README.md"]]

    assert (found["external"], found["pinned"]) == ("pushed", commit)
    files = hub.repositories["org/external"].files()
    config = json.loads(files["config.json"])
    assert (config["text_base_model"], config["text_base_revision"]) == ("org/llm", commit)
    assert not any(key.startswith("text_model.") for key in load_tensors(files["model.safetensors"]))
    card = ModelCard(files["README.md"].decode())
    assert card.data.base_model == ["org/llm"]
    assert f"at revision `{commit}`" in card.text


REPEATED = """
import tiny_models
model, processor = tiny_models.model("dinov2"), tiny_models.processor()
processor.push_to_hub("org/parts")
model.push_to_hub("org/parts", max_shard_size="20KB", tags=["tiny"])
model.push_to_hub("org/parts", license="mit")
model.push_to_hub("org/written")
model.push_to_hub("org/metadata")
model.push_to_hub("org/replaced", overwrite_card=True)
model.save_pretrained("saved", push_to_hub=True, repo_id="org/saved", commit_message="By saving")
model.config.text_base_model = "/home/somebody/llm"
model.push_to_hub(
    "org/saved", revision="bundled", model_card="---\\nlicense: mit\\n---\\n# Mine\\n", overwrite_card=True
)
"""


def test_repeated_pushes_keep_what_is_others(hub: StubHub, tmp_path: Path) -> None:
    written = b"---\nlicense: cc-by-4.0\ntags:\n- mine\n---\n# My model\n\nWords of mine.\n"
    hub.add("org/written", {"README.md": written})
    hub.add("org/replaced", {"README.md": written})
    hub.add("org/metadata", {"README.md": b"---\nlicense: cc-by-4.0\n---\n"})
    hub.run(REPEATED, tmp_path)

    processor_only, sharded, whole = list(hub.repositories["org/parts"].commits.values())[1:]
    assert "README.md" not in processor_only and "processor_config.json" in processor_only
    assert "model.safetensors.index.json" in sharded and "tiny" in ModelCard(sharded["README.md"].decode()).data.tags
    # Old shards would be found beside the new file; the processor stays.
    assert [name for name in whole if "safetensors" in name] == ["model.safetensors"]
    assert "processor_config.json" in whole
    assert ModelCard(whole["README.md"].decode()).data.license == "mit"

    card = ModelCard(hub.repositories["org/written"].files()["README.md"].decode())
    assert card.text == "# My model\n\nWords of mine.\n"
    assert (card.data.license, card.data.tags, card.data.library_name) == (
        "cc-by-4.0",
        ["mine", "llm2clip"],
        "transformers",
    )
    card = ModelCard(hub.repositories["org/metadata"].files()["README.md"].decode())
    assert card.data.license == "cc-by-4.0"
    assert "AutoModel.from_pretrained" in card.text
    card = ModelCard(hub.repositories["org/replaced"].files()["README.md"].decode())
    assert card.data.license is None and "Words of mine" not in card.text

    saved = hub.repositories["org/saved"]
    assert saved.messages[1] == "By saving"
    assert "somebody" not in saved.files("bundled")["config.json"].decode()
    assert saved.files("bundled")["README.md"] == b"---\nlicense: mit\n---\n# Mine\n"
    assert saved.branches["main"] != saved.branches["bundled"]


LOCAL = """
import os
import tiny_models
from llm2clip_hf import LLM2CLIPModel
from llm2clip_hf.hub.publishing import commit_files, publishable_files
from llm2clip_hf.modeling.saving_llm2clip import create_repository

model, processor = tiny_models.model(), tiny_models.processor()
for part in ("text_model", "vision_model"):
    getattr(model, part).save_pretrained(f"secret/{part}")
tiny_models.llama3_tokenizer().save_pretrained("secret/text_model")
home = os.getcwd()
model = LLM2CLIPModel.from_vision_text_pretrained(
    f"{home}/secret/vision_model", f"{home}/secret/text_model", projection_dim=20, adapter_num_layers=1
)
model.push_to_hub("org/local", processor=processor)
model.push_to_hub("org/local", revision="images", text_weights="none")
# A folder that was saved to be loaded here, pushed as it is.
model.config.vision_config._name_or_path = "org/vision"
model.save_pretrained("saved")
create_repository("org/folder")
commit_files("org/folder", "saved", publishable_files("saved"), message="Folder")
"""


def test_no_path_of_this_machine_is_pushed(hub: StubHub, tmp_path: Path) -> None:
    hub.run(LOCAL, tmp_path)
    for name, branch in (("org/local", "main"), ("org/local", "images"), ("org/folder", "main")):
        for file, content in hub.repositories[name].files(branch).items():
            assert b"secret" not in content, (name, file)
    pushed = json.loads(hub.repositories["org/folder"].files()["config.json"])
    saved = json.loads((tmp_path / "saved" / "config.json").read_text())
    # Apart from that, the config is the one that was saved.
    assert saved.pop("text_base_model") == str(tmp_path / "secret" / "text_model")
    assert pushed.pop("text_base_model") is None
    assert pushed == saved and pushed["vision_config"]["_name_or_path"] == "org/vision"


SAVED = """
import tiny_models
model, processor = tiny_models.model(), tiny_models.processor()
push = {"push_to_hub": True, "repo_id": "org/all-options"}
card = "---\\nlicense: mit\\n---\\n# Mine\\n"
model.save_pretrained("first", **push, license="mit", processor=processor, max_shard_size="20KB", private=True)
model.save_pretrained("second", **push, model_card=card, overwrite_card=True)
model.save_pretrained("third", **push, is_main_process=False)
processor.save_pretrained("fourth", **push, commit_message="Processor", commit_description="More")
try:
    processor.save_pretrained("fifth", **push, tags=["x"])
except ValueError as error:
    print(error)
"""


def test_saving_takes_all_options_of_a_push(hub: StubHub, tmp_path: Path) -> None:
    done = hub.run(SAVED, tmp_path)
    repository = hub.repositories["org/all-options"]
    assert repository.private
    assert repository.messages == ["", "Upload LLM2CLIP model", "Upload LLM2CLIP model", "Processor"]
    first, second, _ = list(repository.commits.values())[1:]
    card = ModelCard(first["README.md"].decode())
    assert card.data.license == "mit" and "# Mine" not in card.text
    assert {"processor_config.json", "tokenizer.json"} <= first.keys()
    shards = {name for name in first if name.endswith(".safetensors")}
    assert len(shards) > 5 and shards == {path.name for path in (tmp_path / "first").glob("*.safetensors")}
    assert second["README.md"] == b"---\nlicense: mit\n---\n# Mine\n"
    assert "`tags` is for the card of a repository" in done.stdout
    assert not (tmp_path / "fifth").exists()


# Fine-tuning by a script that has the package: from the Hub, and back to it.
TRAIN = """
import sys
import tiny_models, torch
from llm2clip_hf import LLM2CLIPModel, LLM2CLIPProcessor
from llm2clip_hf.training import LLM2CLIPTrainer, LLM2CLIPTrainingArguments

class Pairs(torch.utils.data.Dataset):
    def __len__(self):
        return 12
    def __getitem__(self, index):
        generator = torch.Generator().manual_seed(index)
        size = tiny_models.IMAGE_SIZE
        return {
            "pixel_values": torch.randn(3, size, size, generator=generator),
            "llm_embeds": torch.randn(tiny_models.TEXT_WIDTH, generator=generator),
        }

def stack(rows):
    return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}

model = LLM2CLIPModel.from_pretrained("org/LLM2CLIP")
processor = LLM2CLIPProcessor.from_pretrained("org/LLM2CLIP")
model.config.text_base_model = "org/llm"
def arguments(**kwargs):
    return LLM2CLIPTrainingArguments(
        "out", per_device_train_batch_size=4, max_steps=2, learning_rate=1e-3, report_to="none", save_steps=1,
        eval_strategy="steps", eval_steps=1, push_to_hub=True, hub_model_id="org/tuned", use_cpu=True, **kwargs
    )

def trainer(**kwargs):
    return LLM2CLIPTrainer(
        model, arguments(**kwargs), data_collator=stack, train_dataset=Pairs(), eval_dataset=Pairs(),
        processing_class=processor,
    )

try:
    trainer(hub_strategy="checkpoint")
except ValueError as error:
    print(error)
run = trainer(hub_always_push=True)
run.train()
run.push_to_hub(dataset_tags="org/pairs", license="mit")
model.save_pretrained("final", text_weights="bundled")
"""


def test_trainer_pushes_a_model_that_loads_with_a_card_of_its_training(
    hub: StubHub, pushed: str, tmp_path: Path
) -> None:
    commit = hub.add("org/llm", llm_files(tmp_path))
    done = hub.run(TRAIN, tmp_path)
    assert "`hub_strategy='checkpoint'` pushes optimizers" in done.stdout
    repository = hub.repositories["org/tuned"]
    assert repository.messages[-1] == "End of training"
    assert "Training in progress, step 1" in repository.messages
    for files in repository.commits.values():
        assert {Path(name).suffix for name in files} <= {".json", ".py", ".safetensors", ".md"}
        assert not [name for name in files if "/" in name or "optimizer" in name or "training_args" in name]
    files = repository.files()
    config = json.loads(files["config.json"])
    assert (config["text_weights"], config["text_base_revision"]) == ("external", commit)
    card = ModelCard(files["README.md"].decode())
    assert (card.data.license, card.data.datasets, card.data.base_model) == ("mit", ["org/pairs"], ["org/llm"])
    assert "| `learning_rate` | 0.001 |" in card.text and "| `steps` | 2 |" in card.text
    assert "image to text recall@1" in card.text and "12 rows" in card.text and "1 x CPU" in card.text

    home = tmp_path / "elsewhere"
    home.mkdir()
    load(hub, home, "org/tuned")
    from llm2clip_hf import LLM2CLIPModel

    assert_loaded(home, LLM2CLIPModel.from_pretrained(tmp_path / "final"))


def llm_files(folder: Path) -> dict[str, bytes]:
    """The LLM of the tiny model as a repository of its own."""
    tiny_models.model("dinov2").text_model.save_pretrained(folder / "llm")
    return {path.name: path.read_bytes() for path in (folder / "llm").iterdir()}


ENCODER = """
import tiny_data, torch
from pathlib import Path
from safetensors.torch import save_file
from llm2clip_hf.data import CaptionPairDataset
from llm2clip_hf.training import (
    CaptionContrastiveTrainer, CaptionContrastiveTrainingArguments, build_caption_encoder
)

tiny_data.write_training_files(Path("."))
encoder = build_caption_encoder("llm")
encoder.push_to_hub("org/encoder", license="llama3.2", train_datasets=["org/captions"])
try:
    encoder.push_to_hub("org/encoder")
except OSError as error:
    print("409" in str(error))
encoder.push_to_hub("org/encoder", exist_ok=True)
save_file({"text": torch.as_tensor(encoder.encode(["a red boat", "two dogs"]))}, "expected.safetensors")
encoder.save_adapter("adapter")
encoder.push_to_hub("org/adapter", local_model_path="adapter")

pairs = CaptionPairDataset({"short": ["a boat", "a dog", "a sea"], "long": ["the boat", "two dogs", "the red sea"]})
args = CaptionContrastiveTrainingArguments(
    "cc", max_steps=2, save_steps=1, per_device_train_batch_size=3, report_to="none", use_cpu=True, bf16=False,
    push_to_hub=True, hub_model_id="org/trained",
)
trainer = CaptionContrastiveTrainer(encoder, args, train_dataset=pairs)
trainer.train()
trainer.push_to_hub(license="llama3.2", blocking=False).result()
"""
LOAD_ENCODER = """
import sys
sys.modules["llm2clip_hf"] = None
import torch
from safetensors.torch import load_file
from sentence_transformers import SentenceTransformer

encoder = SentenceTransformer("org/encoder", trust_remote_code=True, device="cpu")
expected = load_file("expected.safetensors")["text"]
torch.testing.assert_close(torch.as_tensor(encoder.encode(["a red boat", "two dogs"])), expected)
"""


def test_caption_encoder_is_pushed_merged_with_its_card(hub: StubHub, tmp_path: Path) -> None:
    done = hub.run(ENCODER, tmp_path)
    assert "True" in done.stdout.split()
    hub.run(LOAD_ENCODER, tmp_path)
    files = hub.repositories["org/encoder"].files()
    assert "caption_pooling.py" in files and "model.safetensors" in files
    assert not [name for name in files if name.endswith(".bin")]
    card = ModelCard(files["README.md"].decode())
    assert (card.data.license, card.data.datasets) == ("llama3.2", ["org/captions"])
    assert 'SentenceTransformer("org/encoder"' in card.text
    adapter = hub.repositories["org/adapter"].files()
    assert {"adapter_config.json", "caption_encoder.json", "adapter_model.safetensors"} <= adapter.keys()
    assert "model.safetensors" not in adapter

    trained = hub.repositories["org/trained"]
    assert trained.messages == ["", "End of training"]  # and nothing in between
    assert trained.files().keys() == files.keys()
    assert ModelCard(trained.files()["README.md"].decode()).data.license == "llama3.2"
