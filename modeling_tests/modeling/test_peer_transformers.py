# SPDX-License-Identifier: Apache-2.0
"""Model, config, processor and EVA02 tower under the common tests of transformers, as its own models have to."""

import unittest
from typing import Any
from unittest import mock

import peer_tests
import pytest
import tiny_models
import torch
from transformers import set_seed
from transformers.testing_utils import torch_device

from llm2clip_hf import LLM2CLIPConfig, LLM2CLIPModel, LLM2CLIPProcessor
from llm2clip_hf.modeling import Eva02VisionConfig, Eva02VisionModel, pretrained_llm2clip


try:
    ConfigTester: Any = peer_tests.load_peer_module("test_configuration_common").ConfigTester
    ModelTesterMixin: Any = peer_tests.load_peer_module("test_modeling_common").ModelTesterMixin
    ProcessorTesterMixin: Any = peer_tests.load_peer_module("test_processing_common").ProcessorTesterMixin
except peer_tests.PeerTestsUnavailable as unavailable:
    pytest.skip(str(unavailable), allow_module_level=True)


class BundledTester:
    """A sigmoid model that holds its LLM, fed with token ids: a tiny config, inputs for it, and their sizes."""

    batch_size = 5
    seq_length = 7
    num_hidden_layers = 2
    is_training = True
    vision = "clip"

    def get_config(self) -> LLM2CLIPConfig:
        return tiny_models.config(self.vision, text_prefix_length=2, logit_bias_init_value=-10.0)

    def text_inputs(self, generator: torch.Generator) -> dict[str, torch.Tensor]:
        size = (self.batch_size, self.seq_length)
        ids = torch.randint(3, tiny_models.VOCAB, size, generator=generator)
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}

    def prepare_config_and_inputs_for_common(self) -> tuple[LLM2CLIPConfig, dict[str, Any]]:
        texts = self.text_inputs(torch.Generator().manual_seed(3))
        inputs = {"pixel_values": tiny_models.images(self.batch_size), **texts}
        inputs = {name: value.to(torch_device) for name, value in inputs.items()}
        return self.get_config(), {**inputs, "return_loss": True}


class StoredEmbeddingsTester(BundledTester):
    """A softmax model without an LLM, fed with stored LLM embeddings."""

    def get_config(self) -> LLM2CLIPConfig:
        return tiny_models.config(self.vision, text=None)

    def text_inputs(self, generator: torch.Generator) -> dict[str, torch.Tensor]:
        return {"llm_embeds": torch.randn(self.batch_size, tiny_models.TEXT_WIDTH, generator=generator)}


class ModelTests(ModelTesterMixin):
    """The overrides that hold for every variant."""

    all_model_classes = (LLM2CLIPModel,)
    _is_composite = True
    model_tester_class = BundledTester
    towers: tuple[str, ...] = ("text_model_output", "vision_model_output")

    def setUp(self) -> None:
        set_seed(0)
        self.model_tester = self.model_tester_class()

    # The model refuses missing weights, on purpose; with that check off, the test sees how they are initialised. Not
    # with CLIP's tower: in a model that is not of transformers itself, modules without parameters of their own are
    # passed over, and CLIP initialises its attention in these.
    def test_can_init_all_missing_weights(self) -> None:
        self.model_tester.vision = "dinov2"
        with mock.patch.object(pretrained_llm2clip, "check_loading_info"):
            super().test_can_init_all_missing_weights()

    # The test looks for the attentions of a single tower on the output; ours are on the output of each tower.
    def test_attention_outputs(self) -> None:
        config, inputs = self.model_tester.prepare_config_and_inputs_for_common()
        model = LLM2CLIPModel._from_config(config, attn_implementation="eager").to(torch_device).eval()
        outputs = model(**inputs, output_attentions=True)
        for tower in self.towers:
            length = outputs[tower].last_hidden_state.shape[1]
            attentions = outputs[tower].attentions
            assert len(attentions) == self.model_tester.num_hidden_layers
            for attention in attentions:
                assert attention.shape[-2:] == (length, length)
                torch.testing.assert_close(attention.sum(-1), torch.ones_like(attention.sum(-1)))

    # As above, for hidden states.
    def test_hidden_states_output(self) -> None:
        config, inputs = self.model_tester.prepare_config_and_inputs_for_common()
        model = LLM2CLIPModel._from_config(config).to(torch_device).eval()
        outputs = model(**inputs, output_hidden_states=True)
        for tower in self.towers:
            states = outputs[tower].hidden_states
            assert len(states) == self.model_tester.num_hidden_layers + 1
            assert {state.shape for state in states} == {outputs[tower].last_hidden_state.shape}

    # As above, for the gradients of both.
    def test_retain_grad_hidden_states_attentions(self) -> None:
        config, inputs = self.model_tester.prepare_config_and_inputs_for_common()
        model = LLM2CLIPModel._from_config(config, attn_implementation="eager").to(torch_device)
        outputs = model(**inputs, output_hidden_states=True, output_attentions=True)
        kept = [outputs[tower][field][0] for tower in self.towers for field in ("hidden_states", "attentions")]
        for tensor in kept:
            tensor.retain_grad()
        outputs.loss.backward()
        for tensor in kept:
            assert tensor.grad.abs().max() > 0


class LLM2CLIPModelTest(ModelTests, unittest.TestCase):
    additional_model_inputs = ["input_ids"]


class LLM2CLIPModelWithStoredEmbeddingsTest(ModelTests, unittest.TestCase):
    additional_model_inputs = ["llm_embeds"]
    model_tester_class = StoredEmbeddingsTester
    towers = ("vision_model_output",)
    test_resize_embeddings = False  # There are no token embeddings.

    def test_model_get_set_embeddings(self) -> None:
        model = LLM2CLIPModel(self.model_tester.get_config())
        assert model.get_input_embeddings() is None

    def _text_features_prepare_config_and_inputs(self) -> None:
        self.skipTest("Stored embeddings have no sequence of hidden states, which these tests look at.")

    @unittest.skip("The test compares the attention of the vision tower with that of an LLM.")
    def test_sdpa_can_dispatch_composite_models(self) -> None: ...

    @unittest.skip("A softmax model has no `logit_bias`; the sigmoid model runs this test.")
    def test_keep_in_fp32_modules_exist(self) -> None: ...


class LLM2CLIPConfigTest(unittest.TestCase):
    def setUp(self) -> None:
        self.model_tester = BundledTester()

    def config_tester(self, **fields: Any) -> Any:
        return ConfigTester(
            self,
            config_class=LLM2CLIPConfig,
            has_text_modality=False,
            common_properties=["projection_dim", "vision_config", "text_config"],
            **fields,
        )

    def test_config(self) -> None:
        self.config_tester(projection_dim=37, adapter_num_layers=3, text_prefix_length=2).run_common_tests()

    # Without a `text_config`, the default, there is no text sub-config for these two to look at.
    def test_config_with_an_llm(self) -> None:
        tester = self.config_tester(text_config=tiny_models.text_config().to_dict())
        tester.create_and_test_config_from_and_save_pretrained_composite()
        tester.create_and_test_config_from_pretrained_custom_kwargs()


class LLM2CLIPProcessorTest(ProcessorTesterMixin, unittest.TestCase):
    processor_class = LLM2CLIPProcessor

    @classmethod
    def _setup_tokenizer(cls) -> Any:
        return tiny_models.processor().tokenizer

    @classmethod
    def _setup_image_processor(cls) -> Any:
        return tiny_models.image_processor()

    # Saving notes `auto_map` on a processor of a registered class, loading leaves it out, so the two that these tests
    # compare differ in it; unregistered, they must be equal.
    @mock.patch.object(LLM2CLIPProcessor, "_auto_class", None)
    def test_processor_from_and_save_pretrained(self) -> None:
        super().test_processor_from_and_save_pretrained()

    @mock.patch.object(LLM2CLIPProcessor, "_auto_class", None)
    def test_processor_from_and_save_pretrained_as_nested_dict(self) -> None:
        super().test_processor_from_and_save_pretrained_as_nested_dict()


class Eva02Tester:
    """A tiny EVA02: its config, inputs for it, and their sizes."""

    batch_size = 5
    seq_length = 26
    hidden_size = tiny_models.VISION_WIDTH
    num_hidden_layers = 2
    num_attention_heads = 3
    is_training = False  # a tower has no loss of its own

    def get_config(self) -> Eva02VisionConfig:
        return tiny_models.vision_config("eva02")

    def prepare_config_and_inputs_for_common(self) -> tuple[Eva02VisionConfig, dict[str, Any]]:
        return self.get_config(), {"pixel_values": tiny_models.images(self.batch_size).to(torch_device)}


class Eva02Test(ModelTesterMixin, unittest.TestCase):
    all_model_classes = (Eva02VisionModel,)
    test_resize_embeddings = False
    test_torch_exportable = False

    def setUp(self) -> None:
        set_seed(0)
        self.model_tester = Eva02Tester()

    @unittest.skip("A vision tower takes no embeddings.")
    def test_inputs_embeds(self) -> None: ...

    @unittest.skip("A vision tower has a convolution for its input embeddings.")
    def test_model_get_set_embeddings(self) -> None: ...

    def test_config(self) -> None:
        sizes = {"hidden_size": 24, "num_attention_heads": 3}
        ConfigTester(self, config_class=Eva02VisionConfig, has_text_modality=False, **sizes).run_common_tests()
