# SPDX-License-Identifier: Apache-2.0
"""A tiny LLM to make caption encoders of, which no test of this folder changes."""

import pytest
import tiny_models


@pytest.fixture(scope="session")
def llm_dir(tmp_path_factory: pytest.TempPathFactory) -> str:
    return tiny_models.save_llm(tmp_path_factory.mktemp("llm"))
