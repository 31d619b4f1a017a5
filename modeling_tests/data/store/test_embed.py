# SPDX-License-Identifier: Apache-2.0
"""Embedding captions into a store: values, batches with and without padding, resumption after a kill, refusals."""

import copy
import hashlib
import itertools
import json
import re
from typing import Any

import pytest
import tiny_models
import torch
from safetensors.torch import load_file, save_file
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import flash_attention_mask

from llm2clip_hf.data import CaptionEmbeddingStore, CaptionTable, embed_captions, embedding_fingerprint
from llm2clip_hf.data.sampling import token_budget_batches
from llm2clip_hf.data.store.text_encoders import as_text_encoder


FINGERPRINT = {"weights_sha256": "abc", "max_length": 512}
CAPTIONS = {
    "real": [[f"photo {image}" + " x" * (image % 5)] for image in range(23)],
    "dense": [[f"a long text about {image}", f"more of {image}"][: image % 3] for image in range(23)],
}


def encode_text(text: str) -> torch.Tensor:
    digest = hashlib.sha256(text.encode()).digest()
    return torch.tensor(list(digest[:7]), dtype=torch.float32) / 16


class Recorder:
    """An encoder that is a function of the text and notes what it was asked for."""

    def __init__(self) -> None:
        self.batches: list[list[str]] = []

    def __call__(self, texts: list[str]) -> torch.Tensor:
        self.batches.append(texts)
        return torch.stack([encode_text(text) for text in texts])

    @property
    def texts(self) -> list[str]:
        return list(itertools.chain(*self.batches))


def embed(folder, encoder, **kwargs):
    options = {"fingerprint": FINGERPRINT, "rows_per_shard": 10, "show_progress": False, **kwargs}
    return embed_captions(encoder, CAPTIONS, folder, **options)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_store_holds_the_embedding_of_every_caption(tmp_path, dtype):
    store = embed(tmp_path / "store", Recorder(), dtype=dtype, max_tokens_per_batch=20)
    assert store.dtype == getattr(torch, dtype)
    flat = []
    for image in range(23):
        texts = CAPTIONS["real"][image] + CAPTIONS["dense"][image]
        expected = torch.stack([encode_text(text) for text in texts]).to(store.dtype)
        assert torch.equal(store[image], expected)
        assert store.sources(image) == ["real"] + ["dense"] * (image % 3)
        flat += texts
    assert store.num_captions == len(flat)
    assert (len(store), store.embedding_dim, store.source_names) == (23, 7, ("real", "dense"))
    store.verify()


def test_batches_keep_the_token_budget_and_sort_by_length():
    lengths = torch.randint(1, 40, (101,)).tolist()
    batches = list(token_budget_batches(lengths, max_tokens=100))
    assert sorted(itertools.chain(*batches)) == list(range(101))
    in_order = [lengths[item] for item in itertools.chain(*batches)]
    assert in_order == sorted(lengths, reverse=True)
    assert all(len(batch) * max(lengths[item] for item in batch) <= 100 for batch in batches)
    # No batch could have taken the first item of the next one.
    assert all((len(a) + 1) * lengths[a[0]] > 100 for a in batches[:-1])
    assert list(token_budget_batches([500, 3], max_tokens=100)) == [[0], [1]]


def test_equal_captions_of_a_shard_are_encoded_once(tmp_path):
    recorder = Recorder()
    store = embed_captions(
        recorder, ["b", "a", "b", "a"], tmp_path / "s", fingerprint={}, show_progress=False, rows_per_shard=99
    )
    assert sorted(recorder.texts) == ["a", "b"]
    assert torch.equal(store.gather([0, 1, 2, 3]), store.gather([2, 3, 0, 1]))


def test_a_finished_store_is_returned_without_encoding(tmp_path):
    embed(tmp_path, Recorder())
    before = {file.name: file.stat().st_mtime_ns for file in tmp_path.iterdir()}
    recorder = Recorder()
    store = embed(tmp_path, recorder)
    assert recorder.batches == []
    assert store.num_captions == 45
    assert {file.name: file.stat().st_mtime_ns for file in tmp_path.iterdir()} == before


def test_a_finished_store_of_anything_else_is_refused(tmp_path):
    embed(tmp_path, Recorder())
    with pytest.raises(ValueError, match="`fingerprint.weights_sha256`: store 'abc', expected 'xyz'"):
        embed(tmp_path, Recorder(), fingerprint=FINGERPRINT | {"weights_sha256": "xyz"})
    with pytest.raises(ValueError, match="`fingerprint.template`: store '.absent.', expected 'chat'"):
        embed(tmp_path, Recorder(), fingerprint=FINGERPRINT | {"template": "chat"})
    with pytest.raises(ValueError, match="`dtype`: store 'float16', expected 'float32'"):
        embed(tmp_path, Recorder(), dtype="float32")
    with pytest.raises(ValueError, match="other captions in `embeddings-00000.safetensors`, of the rows .0, 10. inst"):
        embed_captions(Recorder(), ["a"], tmp_path, fingerprint=FINGERPRINT, rows_per_shard=10, show_progress=False)


class Interrupted(Exception):
    pass


def interrupt_after(recorder: Recorder, batches: int):
    def encode(texts):
        if len(recorder.batches) == batches:
            raise Interrupted
        return recorder(texts)

    return encode


def test_an_interrupted_run_resumes_at_the_unfinished_shard(tmp_path):
    first, second = Recorder(), Recorder()
    # A budget of 1 token makes batches of one caption: a full shard of 19 and 4 captions of the second.
    with pytest.raises(Interrupted):
        embed(tmp_path / "s", interrupt_after(first, 23), max_tokens_per_batch=1)
    with pytest.raises(ValueError, match="is not finished"):
        CaptionEmbeddingStore.open(tmp_path / "s")
    store = embed(tmp_path / "s", second)
    assert len(second.texts) == 45 - 19
    assert not set(first.texts[:19]) & set(second.texts)
    reference = embed(tmp_path / "reference", Recorder())
    assert torch.equal(store.gather(range(45)), reference.gather(range(45)))
    assert sorted(file.name for file in (tmp_path / "s").iterdir()) == sorted(
        file.name for file in (tmp_path / "reference").iterdir()
    )


def test_leftovers_of_another_run_are_refused_and_kept(tmp_path):
    with pytest.raises(Interrupted):
        embed(tmp_path, interrupt_after(Recorder(), 40), max_tokens_per_batch=1)
    before = sorted(file.name for file in tmp_path.iterdir())
    with pytest.raises(ValueError, match="`fingerprint.max_length`: store 512, expected 77"):
        embed(tmp_path, Recorder(), fingerprint=FINGERPRINT | {"max_length": 77})
    with pytest.raises(ValueError, match=r"of the rows \[0, 10\] instead of \[0, 11\]: check `rows_per_shard`"):
        embed(tmp_path, Recorder(), rows_per_shard=11)
    assert sorted(file.name for file in tmp_path.iterdir()) == before
    save_file({"embeddings": torch.ones(10, 7)}, tmp_path / "embeddings-00000.safetensors")
    with pytest.raises(ValueError, match="00000.safetensors` has no record of what made it"):
        embed(tmp_path, Recorder())


def test_a_finished_shard_that_was_truncated_is_done_again(tmp_path):
    with pytest.raises(Interrupted):
        embed(tmp_path, interrupt_after(Recorder(), 42), max_tokens_per_batch=1)
    damaged = tmp_path / "embeddings-00001.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:-3])
    recorder = Recorder()
    embed(tmp_path, recorder).verify()
    assert len(recorder.texts) == 45 - 19


def overflowing_llm() -> Any:
    """A model in float16 whose states overflow for captions with one word only."""
    model = tiny_models.model()
    word = tiny_models.processor().tokenizer("dogs")["input_ids"][5]
    with torch.no_grad():
        model.text_model.embed_tokens.weight[:, 0] = 0
        model.text_model.embed_tokens.weight[word] = torch.eye(tiny_models.TEXT_WIDTH)[0]
        model.text_model.layers[0].self_attn.o_proj.weight[0] = 0
        model.text_model.layers[0].mlp.up_proj.weight[:, 0] = 6e4
    return model


@pytest.mark.parametrize("kind", ["model", "module"])
def test_a_batch_that_overflows_in_float16_is_embedded_in_float32(kind, tmp_path, caplog):
    captions = ["a red boat on the sea", "dogs", "ein rotes Boot"]
    model, tokenizer = overflowing_llm(), tiny_models.processor().tokenizer
    model.text_model.half()
    exact = copy.deepcopy(model)
    exact.text_model.float()
    expected = torch.cat([exact.get_llm_embeds(**tokenizer([text], return_tensors="pt")) for text in captions])

    class Encoder(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.model = model

        def encode(self, texts, **options):
            return model.get_llm_embeds(**tokenizer(texts, padding=True, return_tensors="pt"))

    arguments = {"tokenizer": tokenizer} if kind == "model" else {"fingerprint": {"llm": "tiny"}}
    encoder = model if kind == "model" else Encoder()
    with torch.no_grad():
        raw = model.get_llm_embeds(**tokenizer(captions, padding=True, return_tensors="pt"))
        assert raw.isfinite().all(1).tolist() == [True, False, True]
        store = embed_captions(
            encoder, captions, tmp_path, dtype="float32", max_tokens_per_batch=1, show_progress=False, **arguments
        )
    assert torch.cosine_similarity(store.gather([0, 1, 2]), expected).min() > 0.9999
    assert torch.allclose(store.gather([1]), expected[1:2], rtol=1e-5)
    assert {parameter.dtype for parameter in model.text_model.parameters()} == {torch.float16}
    if kind == "model":
        assert store.fingerprint["weights_dtype"] == "float16"


def test_an_embedding_that_is_not_finite_in_the_dtype_is_refused(tmp_path):
    def encode(texts):
        return torch.tensor([[1e5 if text == "loud" else 1.0] for text in texts])

    arguments = {"fingerprint": {}, "show_progress": False}
    with pytest.raises(ValueError, match=r"caption 2 of shard 0 \('loud'\) is not finite in torch.float16"):
        embed_captions(encode, ["a", "b", "loud"], tmp_path / "half", **arguments)
    store = embed_captions(encode, ["a", "b", "loud"], tmp_path / "single", dtype="float32", **arguments)
    assert store.gather([2]).item() == 1e5


class FakeBar:
    """What tqdm is told."""

    def __init__(self, **kwargs):
        self.options, self.updates, self.postfix = kwargs, [], ""
        self.disable, self.initial, self.n = False, 0, 0

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        return None

    def update(self, number):
        self.updates.append(number)

    def set_postfix_str(self, text, refresh):
        self.postfix = text


def test_progress_counts_captions_and_leaves_finished_ones_out_of_the_rate(tmp_path, monkeypatch, caplog):
    bars = []
    monkeypatch.setattr(
        "llm2clip_hf.data.store.embed.tqdm", lambda **kwargs: bars.append(FakeBar(**kwargs)) or bars[-1]
    )
    with pytest.raises(Interrupted):
        embed(tmp_path, interrupt_after(Recorder(), 23), max_tokens_per_batch=1, show_progress=True)
    with caplog.at_level("INFO", logger="llm2clip_hf.data"):
        embed(tmp_path, Recorder(), show_progress=True)
    first, second = bars
    assert (first.options["total"], first.options["initial"], first.options["unit"]) == (45, 0, "caption")
    assert (second.options["total"], second.options["disable"], second.initial, second.n) == (45, False, 19, 19)
    assert sum(second.updates) == 26
    assert re.fullmatch(r"\d+ tokens/s", second.postfix)
    assert "Embedded 26 captions in" in caplog.text


def test_the_log_tells_the_share_of_padding(tmp_path, caplog):
    # By the estimate of four bytes per token, 3 and 1 tokens: two rows of three, of which two are padding.
    with caplog.at_level("INFO", logger="llm2clip_hf.data"):
        embed_captions(Recorder(), ["x" * 8, "y"], tmp_path, fingerprint={}, show_progress=False)
    assert "33.3 % of the encoder's tokens padding" in caplog.text


def test_bad_arguments_are_refused_before_anything_is_written(tmp_path):
    folder = tmp_path / "store"
    cases = [
        ({"dtype": "int4"}, "`dtype` must be one of"),
        ({"rows_per_shard": 0}, "`rows_per_shard` must be positive"),
        ({"max_tokens_per_batch": 0}, "`max_tokens_per_batch` must be positive"),
        ({"fingerprint": None}, "`fingerprint` is needed"),
        ({"tokenizer": object()}, "`tokenizer` is used with an `LLM2CLIPModel` only"),
    ]
    for change, message in cases:
        with pytest.raises(ValueError, match=message):
            embed(folder, Recorder(), **change)
    for encoder in (3, torch.nn.Linear(2, 2)):
        with pytest.raises(ValueError, match="is neither a function"):
            embed(folder, encoder)
    assert not folder.exists()
    with pytest.raises(ValueError, match=r"returned shape \(5,\) for 5 captions"):
        embed_captions(lambda texts: torch.ones(5), list("abcde"), folder, fingerprint={}, show_progress=False)


class EncodesLikeSentenceTransformers:
    def __init__(self, modalities: list[str]) -> None:
        self.modalities = modalities
        self.seen: list[object] = []

    def encode(self, inputs, prompt, batch_size, convert_to_tensor, show_progress_bar):
        assert (prompt, convert_to_tensor, show_progress_bar) == ("", True, False)
        self.seen += inputs
        return torch.ones(len(inputs), 3)


@pytest.mark.parametrize(
    ("modalities", "expected"),
    [(["text"], "https://a.b/c.jpg"), (["text", "image"], {"text": "https://a.b/c.jpg"})],
)
def test_an_object_with_encode_gets_captions_as_text(tmp_path, modalities, expected):
    encoder = EncodesLikeSentenceTransformers(modalities)
    embed_captions(encoder, ["https://a.b/c.jpg"], tmp_path, fingerprint={}, show_progress=False)
    assert encoder.seen == [expected]


def test_the_model_is_used_through_its_own_llm_embeddings(tmp_path):
    model, tokenizer = tiny_models.model(), tiny_models.processor().tokenizer
    model.train()
    modes = [module.training for module in model.modules()]
    captions = [["a red boat", " two dogs on a street "], ["x"], ["a red boat in the sea, and a long tail of words"]]
    store = embed_captions(
        model, captions, tmp_path, tokenizer=tokenizer, dtype="float32", max_tokens_per_batch=40, show_progress=False
    )
    assert [module.training for module in model.modules()] == modes
    model.eval()
    for image, texts in enumerate(captions):
        for row, text in enumerate(texts):
            batch = tokenizer([text.strip()], return_tensors="pt")
            with torch.no_grad():
                expected = model.get_llm_embeds(batch["input_ids"], batch["attention_mask"])[0]
            torch.testing.assert_close(store[image][row], expected, rtol=1e-5, atol=1e-5)
    expected_fingerprint = embedding_fingerprint(
        model.text_model, tokenizer, text_prefix_length=model.config.text_prefix_length
    )
    assert CaptionEmbeddingStore.open(tmp_path, expected_fingerprint).fingerprint == expected_fingerprint


def test_an_llm_left_on_the_cpu_beside_a_gpu_is_mentioned(tmp_path, monkeypatch, caplog):
    model, tokenizer = tiny_models.model(), tiny_models.processor().tokenizer
    arguments = {"tokenizer": tokenizer, "show_progress": False}
    embed_captions(model, ["a"], tmp_path / "no_gpu", **arguments)
    assert "CPU" not in caplog.text
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    embed_captions(Recorder(), ["a"], tmp_path / "function", fingerprint={}, show_progress=False)
    assert "CPU" not in caplog.text
    embed_captions(model, ["a"], tmp_path / "model", **arguments)
    assert caplog.text.count("The LLM is on the CPU") == 1
    # Nothing is left to embed.
    embed_captions(model, ["a"], tmp_path / "model", **arguments)
    assert caplog.text.count("The LLM is on the CPU") == 1


def test_the_model_needs_its_tokenizer_and_its_llm(tmp_path):
    tokenizer = tiny_models.processor().tokenizer
    with pytest.raises(ValueError, match="needs its `tokenizer`"):
        embed_captions(tiny_models.model(), ["a"], tmp_path / "a")
    with pytest.raises(ValueError, match="holds no LLM"):
        embed_captions(tiny_models.model(text=None), ["a"], tmp_path / "a", tokenizer=tokenizer)


def test_the_folder_is_plain_safetensors_and_json(tmp_path):
    embed(tmp_path, Recorder())
    index = json.loads((tmp_path / "index.json").read_text())
    names = ["layout.safetensors", *(shard["file"] for shard in index["shards"])]
    assert sorted(file.name for file in tmp_path.iterdir()) == sorted(["index.json", *names])
    assert [(shard["images"], shard["rows"]) for shard in index["shards"]] == [(10, 19), (10, 20), (3, 6)]
    rows = torch.cat([load_file(tmp_path / shard["file"])["embeddings"] for shard in index["shards"]])
    assert torch.equal(rows, CaptionEmbeddingStore.open(tmp_path).gather(range(45)))
    for entry in [index["layout"], *index["shards"]]:
        content = (tmp_path / entry["file"]).read_bytes()
        header = 8 + int.from_bytes(content[:8], "little")
        assert hashlib.sha256(content[header:]).hexdigest() == entry["sha256"]
    # The layout of a shard is that of its own images.
    for shard, first in zip(index["shards"], (0, 10, 20)):
        part = CaptionTable({name: column[first : first + 10] for name, column in CAPTIONS.items()})
        tensors = load_file(tmp_path / shard["file"])
        assert tensors["offsets"].tolist() == part.offsets.tolist()
        assert tensors["source_ids"].tolist() == part.source_ids.tolist()
        assert shard["captions_sha256"] == part.digest()


NAME = "flash_attention_stand_in"
PACKED_CAPTIONS = [
    ["a photo of a red boat on the sea", "a boat"],
    ["x"],
    ["two dogs run over the green grass, one is black " * 4, "two dogs"],
    ["people in a street 12345", "a photo"],
]
shapes = []


def attend_within_segments(module, query, key, value, attention_mask, scaling, dropout=0.0, **kwargs):
    """What varlen flash attention computes, segment by segment, and only from what it is given."""
    assert attention_mask is None
    assert kwargs["max_length_q"] == kwargs["max_length_k"] == int(kwargs["cu_seq_lens_q"].diff().max())
    assert torch.equal(kwargs["cu_seq_lens_q"], kwargs["cu_seq_lens_k"])
    assert kwargs["cu_seq_lens_q"].dtype == torch.int32
    assert kwargs["is_causal"] is False
    shapes.append(tuple(query.shape))
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    outputs = []
    bounds = kwargs["cu_seq_lens_q"].tolist()
    for start, stop in zip(bounds, bounds[1:]):
        q, k, v = (tensor[:, :, start:stop] for tensor in (query, key, value))
        outputs.append((scaling * q @ k.transpose(-1, -2)).softmax(-1) @ v)
    return torch.cat(outputs, dim=2).transpose(1, 2).contiguous(), None


@pytest.fixture(params=["llama", "qwen3", "phi3"])
def model(request):
    return tiny_models.model(text=request.param)


@pytest.fixture
def tokenizer():
    return tiny_models.processor().tokenizer


def use_stand_in(model):
    AttentionInterface.register(NAME, attend_within_segments)
    AttentionMaskInterface.register(NAME, flash_attention_mask)
    model.text_model.config._attn_implementation = NAME
    shapes.clear()


def test_packed_captions_have_the_embeddings_of_padded_ones(tmp_path, model, tokenizer):
    arguments = {"tokenizer": tokenizer, "dtype": "float32", "max_tokens_per_batch": 90, "show_progress": False}
    padded = embed_captions(model, PACKED_CAPTIONS, tmp_path / "padded", **arguments)
    use_stand_in(model)
    packed = embed_captions(model, PACKED_CAPTIONS, tmp_path / "packed", **arguments)
    assert packed.fingerprint == padded.fingerprint
    torch.testing.assert_close(packed.gather(range(7)), padded.gather(range(7)), rtol=1e-5, atol=1e-5)
    # One row per batch, with the tokens of the captions and nothing else, in every layer.
    lengths = [len(tokenizer(text.strip())["input_ids"]) for texts in PACKED_CAPTIONS for text in texts]
    assert all(shape[0] == 1 for shape in shapes)
    assert sum(shape[2] for shape in shapes) == sum(lengths) * model.text_model.config.num_hidden_layers


@pytest.mark.parametrize("pooling", ["eos", "last"])
def test_the_pooling_of_the_model_is_that_of_its_store_packed_or_padded(tmp_path, tokenizer, pooling):
    model = tiny_models.model(text_pooling=pooling)
    arguments = {"tokenizer": tokenizer, "dtype": "float32", "show_progress": False}
    padded = embed_captions(model, PACKED_CAPTIONS, tmp_path / "padded", **arguments)
    use_stand_in(model)
    packed = embed_captions(model, PACKED_CAPTIONS, tmp_path / "packed", **arguments)
    assert padded.fingerprint["pooling"] == packed.fingerprint["pooling"] == pooling
    torch.testing.assert_close(packed.gather(range(7)), padded.gather(range(7)), rtol=1e-5, atol=1e-5)
    # The oracle: the state of the last token of each text, alone in its batch.
    model.text_model.config._attn_implementation = "eager"
    for row, text in enumerate(text for texts in PACKED_CAPTIONS for text in texts):
        with torch.no_grad():
            states = model.text_model(torch.tensor([tokenizer(text.strip())["input_ids"]])).last_hidden_state
        torch.testing.assert_close(packed.gather([row])[0], states[0, -1], rtol=1e-5, atol=1e-5)


def test_a_packed_caption_does_not_depend_on_its_neighbours(model, tokenizer):
    use_stand_in(model)
    encoder = as_text_encoder(model, tokenizer, 512)
    texts = [text for texts in PACKED_CAPTIONS for text in texts]
    together = encoder.encode(texts)
    for row, text in enumerate(texts):
        torch.testing.assert_close(together[row], encoder.encode([text])[0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(together.flip(0), encoder.encode(texts[::-1]), rtol=1e-5, atol=1e-5)


def test_long_captions_are_truncated_alike_and_never_exceed_the_llm(model, tokenizer):
    texts = ["a boat on the sea " * 9, "a dog"]
    padded = as_text_encoder(model, tokenizer, 17).encode(texts)
    model.text_model.config.max_position_embeddings = 16
    use_stand_in(model)
    torch.testing.assert_close(
        as_text_encoder(model, tokenizer, 16).encode(texts[1:])[0], padded[1], rtol=1e-5, atol=1e-5
    )
    with pytest.raises(ValueError, match="has 17 tokens, more than the 16 that the LLM can take"):
        as_text_encoder(model, tokenizer, 17).encode(texts)
    model.text_model.config.max_position_embeddings = 640
    torch.testing.assert_close(as_text_encoder(model, tokenizer, 17).encode(texts), padded, rtol=1e-5, atol=1e-5)


def test_a_header_alone_is_pooled_over_all_it_has(model, tokenizer):
    model.config.text_prefix_length = 30
    padded = as_text_encoder(model, tokenizer, 512).encode(["a boat", "x"])
    use_stand_in(model)
    torch.testing.assert_close(
        as_text_encoder(model, tokenizer, 512).encode(["a boat", "x"]), padded, rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize(
    ("name", "pads"),
    [
        ("flash_attention_2", False),
        ("flash_attention_3", False),
        ("kernels-community/flash-attn2", False),
        ("sdpa", True),
        ("eager", True),
        ("flex_attention", True),
    ],
)
def test_captions_are_packed_for_flash_attention_only(tokenizer, name, pads):
    model = tiny_models.model()
    model.text_model.config._attn_implementation_internal = name
    assert as_text_encoder(model, tokenizer, 512).pads == pads


def test_a_packed_batch_may_be_filled_to_the_budget():
    lengths = torch.randint(1, 40, (101,), generator=torch.Generator().manual_seed(0)).tolist()
    batches = list(token_budget_batches(lengths, max_tokens=100, pads=False))
    assert sorted(item for batch in batches for item in batch) == list(range(101))
    sums = [sum(lengths[item] for item in batch) for batch in batches]
    assert max(sums) <= 100
    # No batch could have taken the first item of the next one.
    assert all(total + lengths[after[0]] > 100 for total, after in zip(sums, batches[1:]))
    assert list(token_budget_batches([500, 3], max_tokens=100, pads=False)) == [[0], [1]]


class Tokenizing(torch.nn.Module):
    """An encoder with a tokenizer, as sentence-transformers models are; notes the batches."""

    max_seq_length = 9

    def __init__(self, tokenizer):
        super().__init__()
        self.tokenizer, self.batches = tokenizer, []

    def encode(self, inputs, **options):
        self.batches.append(inputs)
        return torch.ones(len(inputs), 2)


def test_batches_go_by_the_tokens_where_there_is_a_tokenizer(tmp_path, tokenizer):
    # Many bytes per token and many tokens per byte: an estimate by bytes would turn the order round.
    texts = ["a red boat", "\u1019\u103c\u1014\u103a\u1019\u102c", "x", "1 2 3 4 5 6 7 8 9 10 11"]
    encoder = Tokenizing(tokenizer)
    lengths = [min(9, len(tokenizer(text)["input_ids"])) for text in texts]
    assert as_text_encoder(encoder, None, 512).token_lengths(texts) == lengths
    embed_captions(encoder, texts, tmp_path, fingerprint={}, max_tokens_per_batch=18, show_progress=False)
    for batch in encoder.batches:
        assert len(batch) * max(lengths[texts.index(text)] for text in batch) <= 18
