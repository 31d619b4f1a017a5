# SPDX-License-Identifier: Apache-2.0
"""Fingerprints change with what changes an embedding, and with nothing else."""

import copy
import json

import pytest
import tiny_models
import torch
from safetensors.torch import save_file
from transformers import LlamaForCausalLM

from llm2clip_hf.data import embedding_fingerprint
from llm2clip_hf.data.store.fingerprint import tokenizer_digest, weights_digest, weights_identity
from llm2clip_hf.modeling.modules_llm2clip import sampled_weights_digest


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
