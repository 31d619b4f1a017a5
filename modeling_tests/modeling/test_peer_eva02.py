# SPDX-License-Identifier: Apache-2.0
"""The EVA02 tower under the common tests of transformers, which its own towers have to pass."""

import unittest
from typing import Any

import peer_tests
import pytest
import tiny_models
from transformers import set_seed
from transformers.testing_utils import torch_device

from llm2clip_hf.modeling import Eva02VisionConfig, Eva02VisionModel


try:
    ConfigTester: Any = peer_tests.load_peer_module("test_configuration_common").ConfigTester
    ModelTesterMixin: Any = peer_tests.load_peer_module("test_modeling_common").ModelTesterMixin
except peer_tests.PeerTestsUnavailable as unavailable:
    pytest.skip(str(unavailable), allow_module_level=True)


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
