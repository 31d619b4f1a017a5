# SPDX-License-Identifier: Apache-2.0
"""Fingerprints change with what changes an embedding; models meet embeddings of another LLM, pooling or dtype."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch
from PIL import Image
from process_groups import run_ranks
from safetensors.torch import save_file
from tiny_data import write_training_files
from transformers import AutoModel, AutoModelForCausalLM, LlamaForCausalLM

from llm2clip_hf import LLM2CLIPModel
from llm2clip_hf.cli import main as cli
from llm2clip_hf.data import (
    CaptionEmbeddingStore,
    ImageTextDataset,
    RandomResizedCropTransform,
    embed_captions,
    embedding_fingerprint,
)
from llm2clip_hf.data.store.fingerprint import tokenizer_digest, weights_digest, weights_identity
from llm2clip_hf.modeling.processing_llm2clip import record_text_settings
from llm2clip_hf.modeling.text_llm2clip import sampled_weights_digest
from llm2clip_hf.training.clip.checks import check_stores


@pytest.fixture
def state():
    return {
        "b.weight": torch.randn(3, 5),
        "a": torch.randn(2, 4).bfloat16(),
        "scalar": torch.tensor(3),
        "empty": torch.zeros(0, 7),
        "mask": torch.tensor([True, False]),
    }


def test_weights_digest_agrees_between_module_state_and_files(tmp_path):
    module = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4))
    state = module.state_dict()
    digest = weights_digest(module)
    assert weights_digest(state) == digest
    save_file(state, tmp_path / "model.safetensors")
    assert weights_digest(tmp_path) == weights_digest(str(tmp_path / "model.safetensors")) == digest
    names = list(state)
    sharded = tmp_path / "sharded"
    sharded.mkdir()
    for number, part in enumerate((names[::2], names[1::2])):
        save_file({name: state[name] for name in part}, sharded / f"model-{number}.safetensors")
    assert weights_digest(sharded) == digest


def test_weights_digest_changes_with_value_name_dtype_and_shape(state):
    digest = weights_digest(state)
    assert weights_digest(dict(reversed(state.items()))) == digest
    # Same values in another memory layout.
    assert weights_digest(state | {"b.weight": state["b.weight"].T.contiguous().T}) == digest
    nudged = state["b.weight"].clone()
    nudged[2, 4] = torch.nextafter(nudged[2, 4], torch.tensor(9.0))
    changed = [
        state | {"b.weight": nudged},
        state | {"a": state["a"].float()},
        state | {"a": state["a"].view(4, 2)},
        {("c" if name == "a" else name): value for name, value in state.items()},
        {name: value for name, value in state.items() if name != "empty"},
    ]
    assert len({digest, *map(weights_digest, changed)}) == 6


def test_weights_digest_refuses_a_folder_without_safetensors(tmp_path):
    for path in (tmp_path, tmp_path / "absent.safetensors"):
        with pytest.raises(ValueError, match="holds no safetensors file"):
            weights_digest(path)


def test_tokenizer_digest_ignores_padding_and_truncation_but_not_the_template():
    tokenizer = tiny_models.processor().tokenizer
    digest = tokenizer_digest(tokenizer)
    tokenizer(["a", "a longer text"], padding="max_length", truncation=True, max_length=20)
    tokenizer.padding_side = "left"
    tokenizer(["a", "a longer text"], padding=True)
    assert tokenizer_digest(tokenizer) == digest
    assert tokenizer_digest(tiny_models.processor().tokenizer) == digest
    assert tokenizer_digest(tiny_models.llama3_tokenizer()) != digest
    tokenizer.add_tokens(["boat"])
    assert tokenizer_digest(tokenizer) != digest


def test_tokenizer_digest_refuses_a_tokenizer_without_backend():
    with pytest.raises(ValueError, match="has no `backend_tokenizer`"):
        tokenizer_digest(object())


def test_fingerprint_survives_json_and_names_what_differs(state):
    tokenizer = tiny_models.processor().tokenizer
    fingerprint = embedding_fingerprint(state, tokenizer, text_prefix_length=3, quantization="nf4")
    assert json.loads(json.dumps(fingerprint)) == fingerprint
    assert fingerprint["weights_dtype"] == "bfloat16+bool+float32+int64"
    other = embedding_fingerprint(state, tokenizer, text_prefix_length=3, is_causal=True, max_length=77)
    differing = {key for key in fingerprint | other if fingerprint.get(key) != other.get(key)}
    assert differing == {"is_causal", "max_length", "quantization"}


def test_identity_holds_the_digest_of_the_weights_rounded_to_bfloat16(state):
    rounded = {key: value.bfloat16() if value.is_floating_point() else value for key, value in state.items()}
    assert weights_identity(state)["weights_bf16_sha256"] == weights_digest(rounded)
    assert weights_identity(rounded)["weights_bf16_sha256"] == weights_digest(rounded)
    assert weights_identity(state)["weights_sha256"] == weights_digest(state) != weights_digest(rounded)


def test_sampled_digest_is_that_of_the_llm_in_any_dtype_and_of_no_other():
    llm = tiny_models.model().text_model.to(torch.bfloat16)
    with torch.no_grad():
        # Values that float16 cannot hold exactly.
        llm.layers[0].self_attn.q_proj.weight[:2] = 3.3e-7
    digest = sampled_weights_digest(llm)
    assert weights_identity(llm)["weights_sample_sha256"] == digest
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        assert sampled_weights_digest(copy.deepcopy(llm).to(dtype)) == digest
    assert sampled_weights_digest(tiny_models.model(seed=1).text_model) != digest
    changed = copy.deepcopy(llm)
    with torch.no_grad():
        changed.norm.weight *= 1.05
    assert sampled_weights_digest(changed) != digest
    # A head is not part of the encoder; weights that are not there have no digest.
    headed = LlamaForCausalLM(llm.config).to(torch.bfloat16)
    headed.model.load_state_dict(llm.state_dict())
    assert sampled_weights_digest(headed) == digest
    assert sampled_weights_digest(copy.deepcopy(llm).to("meta")) is None


CAPTIONS = ["a red boat", "two dogs run over the green grass"]
TRAIN = [
    *("--report_to", "none", "--disable_tqdm", "True", "--per_device_train_batch_size", "8", "--use_cpu", "True"),
    *("--projection_dim", "20", "--adapter_num_layers", "1", "--max_steps", "1"),
]


def dataset(encoder: Any, folder: Path) -> ImageTextDataset:
    store = embed_captions(encoder, CAPTIONS, folder, tokenizer=tiny_models.processor().tokenizer, show_progress=False)
    images = [Image.new("RGB", (40, 33)) for _ in CAPTIONS]
    return ImageTextDataset(images, store=store, transform=RandomResizedCropTransform(tiny_models.IMAGE_SIZE))


# -------------------------------------------------------------------------------------------------------- the trainer


def test_a_store_of_another_pooling_is_refused_with_and_without_the_llm(tmp_path: Path) -> None:
    processor, mean = tiny_models.processor(), dataset(tiny_models.model(), tmp_path / "mean")
    last = dataset(tiny_models.model(text_pooling="last"), tmp_path / "last")
    for pooling, right, wrong in (("mean", mean, last), ("last", last, mean)):
        with_llm = tiny_models.model(text_pooling=pooling)
        without = LLM2CLIPModel(tiny_models.config(text_pooling=pooling), load_text_model=False)
        for model in (with_llm, without):
            with pytest.raises(ValueError, match="another text encoder than the model: `pooling`"):
                check_stores(model, wrong, processor)
            assert model.config.text_fingerprint is None
            check_stores(model, right, processor)
            assert model.config.text_fingerprint["pooling"] == pooling


def test_template_and_header_are_compared_without_the_llm(tmp_path: Path) -> None:
    right = dataset(tiny_models.model(), tmp_path)
    model = LLM2CLIPModel(tiny_models.config(), load_text_model=False)
    processor = tiny_models.processor()
    processor.tokenizer = tiny_models.llama3_tokenizer()
    with pytest.raises(ValueError, match="than the model: `tokenizer_sha256`"):
        check_stores(model, right, processor)
    model.config.text_prefix_length = 2
    with pytest.raises(ValueError, match="`text_prefix_length`: store 5, expected 2.*build the model with"):
        check_stores(model, right, tiny_models.processor())


def test_an_llm_in_another_dtype_is_recognized_or_the_dtypes_are_named(tmp_path: Path) -> None:
    half = tiny_models.model()
    half.text_model.to(torch.bfloat16)
    stored = dataset(half, tmp_path / "half")
    full = tiny_models.model()
    full.text_model.load_state_dict({key: value.float() for key, value in half.text_model.state_dict().items()})
    check_stores(full, stored, tiny_models.processor())
    full.text_model.to(torch.float16)
    check_stores(full, stored, tiny_models.processor())
    # From float32, float16 keeps other bits than bfloat16.
    stored = dataset(tiny_models.model(), tmp_path / "full")
    half = tiny_models.model()
    half.text_model.to(torch.float16)
    with pytest.raises(
        ValueError, match="embedded with an LLM in float32, this one is in float16.*load it in float32"
    ):
        check_stores(half, stored, tiny_models.processor())
    with pytest.raises(ValueError, match="than the model: `weights_sha256`"):
        check_stores(tiny_models.model(seed=4), stored, tiny_models.processor())


# ------------------------------------------------------------------------------------------------------- attaching one


@pytest.fixture
def trained(tmp_path: Path) -> tuple[Path, Any]:
    """A saved model without LLM that was trained on the embeddings of one, and that LLM."""
    source = tiny_models.model()
    model = LLM2CLIPModel(tiny_models.config(text_weights="external"), load_text_model=False)
    check_stores(model, dataset(source, tmp_path / "store"), tiny_models.processor())
    source.text_model.save_pretrained(tmp_path / "llm")
    model.config.text_base_model = str(tmp_path / "llm")
    model.save_pretrained(tmp_path / "model")
    return tmp_path / "model", source.text_model


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_llm_of_the_embeddings_is_attached_in_any_dtype(trained: tuple[Path, Any], dtype: torch.dtype) -> None:
    folder, _ = trained
    model = LLM2CLIPModel.from_pretrained(folder, text_model_kwargs={"dtype": dtype})
    assert model.text_model.dtype == dtype
    model = LLM2CLIPModel.from_pretrained(folder, load_text_model=False)
    model.attach_text_model(AutoModel.from_pretrained(model.config.text_base_model, dtype=dtype))


def test_another_llm_is_refused_unless_it_is_wanted(trained: tuple[Path, Any]) -> None:
    folder, llm = trained
    other = tiny_models.model(seed=7).text_model
    digests = [weights_identity(each)["weights_sample_sha256"] for each in (other, llm)]
    with pytest.raises(ValueError, match=rf"is not the one .* weights is {digests[0]}, .* says {digests[1]}"):
        LLM2CLIPModel.from_pretrained(folder, text_model=other)
    model = LLM2CLIPModel.from_pretrained(folder, load_text_model=False)
    with pytest.raises(ValueError, match="is not the one"):
        model.attach_text_model(other)
    assert model.text_model is None
    wanted = LLM2CLIPModel.from_pretrained(folder, text_model=other, text_fingerprint=None)
    assert wanted.config.text_fingerprint is None
    assert wanted.text_model is other
    # What the named folder holds now is another LLM than when the model was trained.
    other.save_pretrained(model.config.text_base_model)
    with pytest.raises(ValueError, match="is not the one"):
        LLM2CLIPModel.from_pretrained(folder)


def test_a_model_that_would_pool_other_tokens_than_its_embeddings_is_refused(tmp_path: Path) -> None:
    source = tiny_models.model()
    model = tiny_models.model(text=None)
    check_stores(model, dataset(source, tmp_path), tiny_models.processor())
    with pytest.raises(ValueError, match=r"`config.text_prefix_length` is 0, but .* made with 5"):
        model.attach_text_model(source.text_model)
    model.config.text_prefix_length = 5
    model.attach_text_model(source.text_model)
    assert model.text_model is source.text_model


def test_fingerprints_without_a_sample_and_changed_weights_are_not_compared(trained: tuple[Path, Any]) -> None:
    folder, llm = trained
    other = tiny_models.model(seed=7).text_model
    model = LLM2CLIPModel.from_pretrained(folder, load_text_model=False)
    del model.config.text_fingerprint["weights_sample_sha256"]
    model.attach_text_model(other)
    quantised = copy.deepcopy(llm)
    quantised.config.quantization_config = {"quant_method": "some"}
    assert "weights_sample_sha256" not in weights_identity(quantised)


def stage1_folder(path: Path, pooling: str = "mean") -> Path:
    """The LLM of `tiny_models.model()` as stage 1 and `convert` save one: with pooling, header and template."""
    llm, tokenizer = tiny_models.model().text_model, tiny_models.processor().tokenizer
    record_text_settings(llm.config, tokenizer, pooling)
    llm.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


@pytest.mark.parametrize("pooling", ["mean", "last"])
def test_an_llm_attached_later_embeds_as_in_a_model_built_with_it(pooling: str, tmp_path: Path) -> None:
    folder = stage1_folder(tmp_path / "llm", pooling)
    together = tiny_models.model(text_pooling=pooling)
    batch = tiny_models.processor()(text=CAPTIONS)
    expected = together.get_llm_embeds(**batch)
    without = tiny_models.model(text=None)
    assert without.config.text_prefix_length is None
    without.save_pretrained(tmp_path / "model")
    by_hand = LLM2CLIPModel.from_pretrained(tmp_path / "model")
    by_hand.attach_text_model(AutoModel.from_pretrained(folder), text_weights="bundled")
    given = LLM2CLIPModel.from_pretrained(tmp_path / "model", text_model=AutoModel.from_pretrained(folder))
    without.config.text_weights, without.config.text_base_model = "external", str(folder)
    without.save_pretrained(tmp_path / "external")
    by_hand.save_pretrained(tmp_path / "bundled")
    reloaded = [LLM2CLIPModel.from_pretrained(tmp_path / name) for name in ("external", "bundled")]
    for model in (by_hand, given, *reloaded):
        torch.testing.assert_close(model.get_llm_embeds(**batch), expected)
        assert (model.config.text_prefix_length, model.config.text_pooling) == (5, pooling)


def test_an_llm_that_does_not_say_how_long_its_header_is_is_not_attached_silently(tmp_path: Path) -> None:
    raw = tiny_models.model().text_model
    raw.save_pretrained(tmp_path / "llm")
    for text in (None, "llama"):  # without any LLM, and with the config of one
        source = LLM2CLIPModel(tiny_models.config(text=text, text_prefix_length=None, text_weights="none"))
        source.save_pretrained(tmp_path / "model")
        model = LLM2CLIPModel.from_pretrained(tmp_path / "model")
        with pytest.raises(ValueError, match="Neither the model nor the LLM says how many leading tokens"):
            model.attach_text_model(raw)
        with pytest.raises(ValueError, match="Neither the model nor the LLM says how many leading tokens"):
            LLM2CLIPModel.from_pretrained(tmp_path / "model", text_model=raw)
        model = LLM2CLIPModel.from_pretrained(tmp_path / "model", text_model=raw, text_prefix_length=5)
        batch = tiny_models.processor()(text=CAPTIONS)
        torch.testing.assert_close(model.get_llm_embeds(**batch), tiny_models.model().get_llm_embeds(**batch))


def test_an_llm_of_another_header_or_template_is_refused(folder: Path, tmp_path: Path) -> None:
    llm = stage1_folder(tmp_path / "llm")
    with pytest.raises(ValueError, match="`text_prefix_length` is 1, but the LLM is a caption encoder trained with 5"):
        tiny_models.model(text_prefix_length=1, text_weights="none").attach_text_model(AutoModel.from_pretrained(llm))
    tiny_models.llama3_tokenizer().save_pretrained(llm)  # as of the LLM that it was made of
    assert LLM2CLIPModel.from_vision_text_pretrained(str(folder / "vision"), str(llm)).config.text_prefix_length == 5
    with pytest.raises(ValueError, match="`text_template=None` gives texts another template"):
        LLM2CLIPModel.from_vision_text_pretrained(str(folder / "vision"), str(llm), text_template=None)


# ------------------------------------------------------------------------------------- an external LLM was changed


@pytest.fixture
def external(tmp_path: Path) -> LLM2CLIPModel:
    """A model that names its LLM, loaded with it."""
    stage1_folder(tmp_path / "llm")
    model = tiny_models.model(text_base_model=str(tmp_path / "llm"))
    model.save_pretrained(tmp_path / "named", text_weights="external")
    return LLM2CLIPModel.from_pretrained(tmp_path / "named")


def exchange_by_attaching(model: LLM2CLIPModel) -> None:
    model.attach_text_model(tiny_models.model(seed=7).text_model)


def exchange_by_assigning(model: LLM2CLIPModel) -> None:
    model.text_model = tiny_models.model(seed=7).text_model


def load_trained_weights(model: LLM2CLIPModel) -> None:
    model.text_model.load_state_dict(tiny_models.model(seed=7).text_model.state_dict())


@torch.no_grad()
def train_one_matrix(model: LLM2CLIPModel) -> None:
    weight = model.text_model.layers[1].self_attn.v_proj.weight
    weight += 0.01 * torch.randn(len(weight), 2) @ torch.randn(2, weight.shape[1])


@pytest.mark.parametrize(
    "change", [exchange_by_attaching, exchange_by_assigning, load_trained_weights, train_one_matrix]
)
def test_a_changed_external_llm_is_bundled_renamed_or_refused(change: Any, external: Any, tmp_path: Path) -> None:
    batch = tiny_models.processor()(text=CAPTIONS)
    before = external.get_llm_embeds(**batch)
    change(external)
    expected = external.get_llm_embeds(**batch)
    assert (expected - before).abs().max() > 1e-4
    for weights in (None, "external"):
        with pytest.raises(ValueError, match="is 'external', but the LLM was trained or exchanged"):
            external.save_pretrained(tmp_path / "again", text_weights=weights)
    external.save_pretrained(tmp_path / "bundled", text_weights="bundled")
    external.text_model.save_pretrained(tmp_path / "new")
    external.config.text_base_model = str(tmp_path / "new")
    external.save_pretrained(tmp_path / "renamed")
    for name in ("bundled", "renamed"):
        torch.testing.assert_close(LLM2CLIPModel.from_pretrained(tmp_path / name).get_llm_embeds(**batch), expected)


def test_another_llm_given_on_loading_is_not_saved_as_the_named_one(external: Any, tmp_path: Path) -> None:
    other = tiny_models.model(seed=7).text_model
    for model in (
        LLM2CLIPModel.from_pretrained(tmp_path / "named", text_model=other),
        LLM2CLIPModel.from_pretrained(tmp_path / "named", load_text_model=False),
    ):
        if model.text_model is None:
            model.attach_text_model(other)
        with pytest.raises(ValueError, match="is not known to be the one that `config.text_base_model`"):
            model.save_pretrained(tmp_path / "again")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_named_llm_is_saved_as_external_in_any_dtype(dtype: torch.dtype, external: Any, tmp_path: Path) -> None:
    own = LLM2CLIPModel.from_pretrained(tmp_path / "named", load_text_model=False)
    own.attach_text_model(AutoModel.from_pretrained(tmp_path / "llm", dtype=dtype))
    external.text_model.to(dtype)
    for model in (external, own):
        model.save_pretrained(tmp_path / "again")
        assert LLM2CLIPModel.from_pretrained(tmp_path / "again").text_model_is_named()


def test_training_around_an_exchanged_llm_saves_it(external: Any, tmp_path: Path) -> None:
    from llm2clip_hf.training.clip.checkpoints import saved_text_weights

    assert saved_text_weights(external) == "external"
    exchange_by_attaching(external)
    assert saved_text_weights(external) == "bundled"


# ------------------------------------------------------------------------------------------------------------ the CLI


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("identity")
    write_training_files(path)
    torch.manual_seed(9)
    AutoModelForCausalLM.from_config(tiny_models.text_config()).save_pretrained(path / "other")
    tiny_models.llama3_tokenizer().save_pretrained(path / "other")
    return path


def train_clip(folder: Path, llm: str, store: str, output: str, *more: str) -> int:
    return cli.main(
        [
            *("train-clip", "--vision_model", str(folder / "vision"), "--text_model", str(folder / llm)),
            *("--data", str(folder / "train.parquet"), "--store", str(folder / store)),
            *("--output_dir", str(folder / output), *TRAIN, *more),
        ]
    )


def test_a_finished_store_of_another_llm_or_template_stops_the_run(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("sentence_transformers")
    assert train_clip(folder, "llm", "store", "first") == 0
    store = CaptionEmbeddingStore.open(folder / "store")
    capsys.readouterr()
    assert train_clip(folder, "other", "store", "wrong") == 1
    error = capsys.readouterr().err
    assert "were made by another LLM than" in error
    assert str(store.fingerprint["weights_sha256"]) in error
    other = AutoModel.from_pretrained(folder / "other")
    assert str(weights_identity(other)["weights_sha256"]) in error
    assert train_clip(folder, "llm", "store", "wrong", "--template", "none") == 1
    assert "`text_prefix_length`: store 5, expected" in capsys.readouterr().err
    assert train_clip(folder, "llm", "store", "wrong", "--max_length", "9") == 1
    assert "were cut at 512 tokens, `max_length` is 9" in capsys.readouterr().err
    assert not (folder / "wrong" / "config.json").exists()
    # The right one is found right, and the model that was trained loads with its LLM.
    assert train_clip(folder, "llm", "store", "second") == 0
    model = LLM2CLIPModel.from_pretrained(folder / "second")
    assert model.config.text_fingerprint == store.fingerprint


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_store_is_recognized_whatever_made_it(folder: Path, dtype: str) -> None:
    pytest.importorskip("sentence_transformers")
    from llm2clip_hf import LLM2CLIPProcessor
    from llm2clip_hf.data import load_image_text

    vision, llm = str(folder / "vision"), str(folder / "llm")
    model = LLM2CLIPModel.from_vision_text_pretrained(vision, llm, text_model_kwargs={"dtype": dtype})
    tokenizer = LLM2CLIPProcessor.from_vision_text_pretrained(vision, llm).tokenizer
    captions = load_image_text(folder / "train.parquet").captions
    embed_captions(model, captions, folder / f"by-model-{dtype}", tokenizer=tokenizer, show_progress=False)
    assert train_clip(folder, "llm", f"by-model-{dtype}", f"from-model-{dtype}") == 0
    assert train_clip(folder, "other", f"by-model-{dtype}", "wrong") == 1


def test_the_llm_is_read_once_and_its_refusal_reaches_all_ranks(folder: Path, tmp_path: Path) -> None:
    dataset(tiny_models.model(), tmp_path / "store")

    def check() -> tuple[str, int]:
        from llm2clip_hf.cli import clip_plan as store_check

        reads = []
        load = store_check._weights_of
        store_check._weights_of = lambda *inputs: reads.append(inputs) or load(*inputs)
        try:
            store_check.check_finished_stores(
                store_check_options(folder), [str(tmp_path / "store"), str(tmp_path / "store")]
            )
        except ValueError as error:
            return str(error), len(reads)
        return "", len(reads)

    (first, reads), (second, no_reads) = run_ranks(2, check)
    assert first == second
    assert "were made by another LLM than" in first
    assert (reads, no_reads) == (1, 0)


def store_check_options(folder: Path) -> Any:
    from llm2clip_hf.cli.train_clip import TrainClipOptions

    return TrainClipOptions(text_model=str(folder / "other"))


def test_what_cannot_be_compared_is_said(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    from llm2clip_hf.cli.clip_plan import check_finished_stores
    from llm2clip_hf.cli.train_clip import TrainClipOptions

    encode = lambda texts: torch.ones(len(texts), tiny_models.TEXT_WIDTH)  # noqa: E731
    embed_captions(encode, ["a"], folder / "own", fingerprint={"llm": "ones"}, show_progress=False)
    check_finished_stores(TrainClipOptions(text_model="anything"), [str(folder / "own"), str(folder / "missing")])
    assert "does not record the weights of its LLM" in caplog.text
    embed_captions(
        encode, ["a"], folder / "gone", fingerprint={"weights_sha256": "ab", "weights_dtype": "bfloat16"},
        show_progress=False,
    )  # fmt: skip
    check_finished_stores(TrainClipOptions(text_model=str(folder / "nowhere")), [str(folder / "gone")])
    assert "cannot be read" in caplog.text


@pytest.mark.parametrize(("device", "dtype"), [("cpu", torch.float32), ("meta", torch.float16)])
def test_captions_are_embedded_in_float32_on_a_cpu_and_in_float16_elsewhere(
    device: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    from llm2clip_hf.cli.embed_captions import EmbedCaptionsOptions, load_encoder

    model = tiny_models.model()
    model.text_model.to(torch.bfloat16)
    model.save_pretrained(tmp_path)
    tiny_models.processor().save_pretrained(tmp_path)
    encoder, _ = load_encoder(EmbedCaptionsOptions(), str(tmp_path), device)
    assert encoder.text_model.dtype == dtype
    encoder, _ = load_encoder(EmbedCaptionsOptions(dtype="bfloat16"), str(tmp_path), device)
    assert encoder.text_model.dtype == torch.bfloat16
