# SPDX-License-Identifier: Apache-2.0
"""Shared settings and fixtures: offline, seeded, Triton interpreter without a GPU, the optional data folder."""

import importlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any


os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_DATASETS_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch


if not torch.cuda.is_available():
    # Kernels run on CPU tensors in the interpreter; the flag is read when a kernel is decorated.
    os.environ.setdefault("TRITON_INTERPRET", "1")


# Marks on the common tests of transformers, which `test_peer_transformers.py` runs.
PEER_MARKS = ("accelerate_tests", "flash_attn_test", "flash_attn_3_test", "flash_attn_4_test", "torch_compile_test")


def pytest_configure(config: pytest.Config) -> None:
    for mark in PEER_MARKS:
        config.addinivalue_line("markers", f"{mark}: on a common test of transformers")


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def shared_dir() -> Path:
    """The folder `shared` beside the checkout (real data, weights, vectors); tests that need it skip without it."""
    path = Path(__file__).resolve().parents[2] / "shared"
    if not (path / "data").is_dir():
        pytest.skip("the folder `shared` with data and reference vectors is not beside this checkout")
    return path


@pytest.fixture(scope="session")
def llm_dir(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The folder of a small Llama with the tokenizer of Llama 3; for reading only."""
    import tiny_models

    return tiny_models.save_llm(tmp_path_factory.mktemp("llm"))


@pytest.fixture(scope="session")
def lm_dir(tmp_path_factory: pytest.TempPathFactory) -> str:
    """As `llm_dir`, with a language-model head; for reading only."""
    import tiny_models
    from transformers import AutoModelForCausalLM

    return tiny_models.save_llm(tmp_path_factory.mktemp("lm"), head=AutoModelForCausalLM)


class _Parsed(BaseException):
    """Raised where a verb would go on to work, with the options that it has read."""


@pytest.fixture
def read_options(monkeypatch: pytest.MonkeyPatch) -> Callable[[str, list[str]], tuple[Any, ...]]:
    """What a verb reads from arguments, without its work."""

    def read(verb: str, arguments: list[str]) -> tuple[Any, ...]:
        from llm2clip_hf.cli.main import VERBS

        module: Any = importlib.import_module(f"llm2clip_hf.cli.{VERBS[verb][0]}")
        parse_options = module.parse_options

        def parse(*args: Any, **kwargs: Any) -> None:
            raise _Parsed(*parse_options(*args, **kwargs))

        with monkeypatch.context() as patch:
            patch.setattr(module, "parse_options", parse)
            with pytest.raises(_Parsed) as parsed:
                module.run(arguments)
        return parsed.value.args

    return read
