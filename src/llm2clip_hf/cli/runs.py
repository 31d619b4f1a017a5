# SPDX-License-Identifier: Apache-2.0
"""What the training verbs share: which run a folder holds, where to resume, what not to overwrite, the results."""

import contextlib
import json
import logging
import os
import platform
import re
import shlex
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any


if TYPE_CHECKING:
    from ..data import CaptionEmbeddingStore


RESULTS_FILE = "results.json"
RUN_FILE = "run.json"
_MODEL_OPTIONS = ("llm", "model", "vision_model", "text_model", "clip_text_model")
# Options that say where data are, for which their digests stand, and those that leave the course of a run as it is.
_NOT_IDENTITY = re.compile(
    "check|data|captions|sources|(caption|image|key)_(columns?|root)|split|subset|hard_negatives|instruction|"
    "num_test_images|(test|eval|zero_shot|early_stopping)_.*|on_bad_.*|store|max_tokens_per_batch|rows_per_shard|"
    "device|trust_remote_code|attn_implementation|adapter_only|text_weights"
)
_TRAINING = (
    *("learning_rate", "lr_scheduler_type", "lr_scheduler_kwargs", "warmup_steps", "weight_decay", "max_grad_norm"),
    *("optim", "optim_args", "adam_beta1", "adam_beta2", "adam_epsilon", "num_train_epochs", "max_steps", "seed"),
    *("data_seed", "label_smoothing_factor", "neftune_noise_alpha"),
)
_SPEED = ("mini_batch_size", "mini_batch_tokens", "encoder_chunk_size", "loss_exchange")


def logs_to_stderr() -> contextlib.AbstractContextManager[Any]:
    """What is printed meanwhile, such as the logs of a trainer, goes to standard error: the result stands alone."""
    return contextlib.redirect_stdout(sys.stderr)


def resume_point(args: Any) -> Any:
    """The checkpoint to resume from: `last` of the output folder, a path, or none."""
    given = args.resume_from_checkpoint
    if given in (None, "", "none", "false", "False"):
        return None
    if given not in ("last", "true", "True", "auto"):
        if not Path(given).is_dir():
            raise ValueError(f"`--resume_from_checkpoint {given}` is no folder. Give a checkpoint, or `last`.")
        return given
    folder = str(args.output_dir)
    checkpoint = last_checkpoint(folder)
    if checkpoint is None and given != "auto":
        raise ValueError(f"`{folder}` holds no checkpoint to resume from. Leave `--resume_from_checkpoint` out.")
    return checkpoint


def last_checkpoint(folder: str | Path) -> str | None:
    """The checkpoint of the highest step in a folder, which may be absent."""
    from transformers.trainer_utils import get_last_checkpoint

    last: str | None = get_last_checkpoint(str(folder)) if os.path.isdir(folder) else None
    return last


def refuse_finished(output_dir: Any, marker: str, resume: Any) -> None:
    """Refuses to write over a finished model, a folder to resume in is none, or where nothing can be written."""
    there = next(path for path in (Path(str(output_dir)), *Path(str(output_dir)).absolute().parents) if path.exists())
    if not (there.is_dir() and os.access(there, os.W_OK)):
        raise ValueError(f"`--output_dir {output_dir}`: `{there}` is no folder that can be written to.")
    if resume is None and (Path(str(output_dir)) / marker).exists():
        raise ValueError(
            f"`{output_dir}` already holds a finished model. Choose another `--output_dir`, or delete the folder."
        )


def run_identity(verb: str, options: Any, args: Any, data: Mapping[str, Any]) -> dict[str, Any]:
    """What determines the course of a run, as JSON: models, data, options of the verb, settings of the training."""
    from transformers import TrainingArguments

    own = {field.name: getattr(options, field.name) for field in fields(options)}
    identity: dict[str, Any] = {name: value for name, value in own.items() if not _NOT_IDENTITY.fullmatch(name)}
    identity |= {name: _model_identity(own[name]) for name in _MODEL_OPTIONS if own.get(name) is not None}
    added = {field.name for field in fields(args)} - {field.name for field in fields(TrainingArguments)} - {*_SPEED}
    identity |= {name: getattr(args, name) for name in (*_TRAINING, *sorted(added)) if hasattr(args, name)}
    result: dict[str, Any] = json.loads(json.dumps({"verb": verb, **data, **identity}, default=str))
    return result


def table_identity(table: Any) -> dict[str, Any]:
    """Images with captions by digests of captions, keys and weights; nothing for shards, known by their names."""
    if table is None:
        return {}
    from ..data.store.fingerprint import lines_digest

    found = {"data": table.captions.sha256, "images": len(table)}
    if table.keys is not None:
        found["keys"] = lines_digest(table.keys, "\0")
    if table.weights is not None:
        found["weights"] = lines_digest([repr(weight) for weight in table.weights.tolist()], "\0")
    return found


def claim_folder(args: Any, identity: Mapping[str, Any], resume: Any, *, write: bool = True) -> Any:
    """Where a run in this folder begins; a folder with checkpoints of another run is refused."""
    folder = Path(str(args.output_dir))
    file, asked = folder / RUN_FILE, args.resume_from_checkpoint
    if any(folder.glob("checkpoint-*")) or (folder / "mntp").exists():
        remedy = (
            f"Choose another `--output_dir` or delete the folder. To go on from its weights all the same, add "
            f"`--resume_from_checkpoint {folder}/checkpoint-N` to the other folder."
        )
        is_named = asked != "auto" and resume is not None and Path(resume).resolve().parent == folder.resolve()
        if not file.is_file() and not is_named:
            raise ValueError(
                f"`{folder}` holds checkpoints of a run that left no `{RUN_FILE}`, so it may be another one. If it is "
                f"this one, give `--resume_from_checkpoint last`. {remedy}"
            )
        before = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
        if changed := [name for name in before if _content(before[name]) != _content(identity.get(name))]:
            told = ", ".join(
                f"`{name}` was {_told(before[name])} and is {_told(identity.get(name))}" for name in changed
            )
            raise ValueError(f"`{folder}` holds checkpoints of another run: {told}. {remedy}")
        if asked in (None, ""):
            resume = last_checkpoint(folder)
            if resume is not None and args.should_save and write:
                print(f"continues from {resume}", file=sys.stderr)
    if write and args.should_save:
        from ..files import write_json_atomically

        folder.mkdir(parents=True, exist_ok=True)
        write_json_atomically(file, dict(identity))
    return resume


def claim_run(verb: str, options: Any, args: Any, data: Mapping[str, Any], resume: Any) -> Any:
    """`claim_folder` for the `run_identity` of these arguments; with `--check`, nothing is written."""
    return claim_folder(args, run_identity(verb, options, args, data), resume, write=not options.check)


def _model_identity(name: str) -> dict[str, Any]:
    folder = Path(name)
    if folder.is_dir():
        from ..data.store.fingerprint import files_digest

        kinds = ("*.safetensors", "*.bin", "*.gguf", "*.json", "*.model", "[0-9]_*/config.json")
        files = {file for kind in kinds for file in folder.glob(kind)}
        return {"name": name, "sha256": files_digest(files - {folder / RESULTS_FILE, folder / RUN_FILE}, folder)}
    from transformers.utils.hub import cached_file, extract_commit_hash

    try:
        return {"name": name, "commit": extract_commit_hash(cached_file(name, "config.json"), None)}
    except OSError:  # which loading the model tells in its words
        return {"name": name}


def _content(value: Any) -> Any:
    """A model by what its files hold, wherever they are."""
    return value["sha256"] if isinstance(value, dict) and {"name", "sha256"} <= value.keys() else value


def _told(value: Any) -> str:
    is_model = _content(value) is not value
    return f"{value['name']} (sha256 {value['sha256'][:12]})" if is_model else str(value)


def write_results(output_dir: Any, results: Mapping[str, Any]) -> Path:
    """Writes `results.json`: the results, the command, and the versions that gave them."""
    import torch
    import transformers

    from ..files import write_json_atomically
    from ..version import __version__

    record = {
        **results,
        "command": shlex.join(["llm2clip", *sys.argv[1:]]),
        "versions": {
            "llm2clip_hf": __version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "python": platform.python_version(),
        },
    }
    path = Path(str(output_dir)) / RESULTS_FILE
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json_atomically(path, json.loads(json.dumps(record, default=str)))
    return path


def bundle(options: Any, folder: str) -> None:
    """
    Puts the LLM into a saved model that only names it, or that was trained without it.

    The new files are written beside and flushed to disk before they take the place of the old ones, which takes no
    longer than to rename them. Meanwhile there is no config, so that the folder never passes for a finished model.
    """
    from .. import LLM2CLIPModel
    from ..files import UNFINISHED, publish_folder

    kwargs: dict[str, Any] = {} if options.dtype is None else {"dtype": options.dtype}
    text_model = None
    if options.model is not None and options.text_model is None:
        trust = options.trust_remote_code
        text_model = LLM2CLIPModel.from_pretrained(options.model, trust_remote_code=trust, **kwargs).text_model
    model = LLM2CLIPModel.from_pretrained(folder, text_model=text_model, text_model_kwargs=kwargs)
    model.config.text_weights = "bundled"
    target = Path(folder)
    staging, complete = target / f"{UNFINISHED}model", target / f"{UNFINISHED}bundled-model"
    for leftover in (staging, complete):
        shutil.rmtree(leftover, ignore_errors=True)
    try:
        model.save_pretrained(staging)
        publish_folder(staging, complete)  # flushes the files
    except OSError:
        shutil.rmtree(staging, ignore_errors=True)  # what a full disk needs most is space
        raise
    (target / "config.json").unlink()
    if not (complete / "model.safetensors").exists():
        (target / "model.safetensors").unlink()  # would be read in place of several files
    for file in sorted(complete.iterdir(), key=lambda file: file.name == "config.json"):
        os.replace(file, target / file.name)
    complete.rmdir()


def print_results(results: dict[str, Any], num_images: int) -> None:
    """Caption retrieval accuracy before and after, in percent."""
    print(f"\n{f'caption retrieval, {num_images} images':<36}{'before':>8}{'after':>8}")
    for key, name in (
        ("caption_retrieval_accuracy", "accuracy (CRA), both ways"),
        ("first_to_second_recall@1", "caption 1 to 2"),
        ("second_to_first_recall@1", "caption 2 to 1"),
        ("mean_recall@5", "R@5"),
        ("mean_recall@10", "R@10"),
    ):
        print(f"  {name:<34}{100 * results['before'][key]:8.1f}{100 * results['after'][key]:8.1f}")


def process_device(given: str | None) -> str:
    """The device of this process: the given one, its own GPU, or the CPU; a `ValueError` if it is not there."""
    import torch

    if given is not None:
        try:
            torch.empty(0, device=given)
        except (AssertionError, RuntimeError) as error:
            raise ValueError(f"`--device {given}` cannot be used: {error}") from error
        return given
    if not torch.cuda.is_available():
        return "cpu"
    return f"cuda:{int(os.environ.get('LOCAL_RANK', 0))}"


def is_main_process() -> bool:
    """Whether this process is the one that prints and writes."""
    return int(os.environ.get("RANK", 0)) == 0


@contextmanager
def process_group(device: str) -> Iterator[None]:
    """The process group of all processes that were started together; none for a single one."""
    import torch
    import torch.distributed as dist

    if int(os.environ.get("WORLD_SIZE", 1)) == 1 or dist.is_initialized():
        yield
        return
    on_gpu = torch.device(device).type == "cuda"
    if on_gpu:
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if on_gpu else "gloo")
    try:
        yield
    finally:
        dist.destroy_process_group()


logger = logging.getLogger(__name__)


def check_finished_stores(options: Any, folders: Iterable[str]) -> None:
    """
    Compares the LLM's weights with what finished stores say of them; template, tokenizer and pooling are compared by
    the trainer, which has the model's.

    The LLM is read once, on the CPU of the first process, whose error is that of all.
    """
    from ..data import CaptionEmbeddingStore

    stores = [CaptionEmbeddingStore.open(folder) for folder in folders if CaptionEmbeddingStore.is_finished(folder)]
    for store in stores:
        length = store.fingerprint.get("max_length")
        if options.max_length is not None and length is not None and length != options.max_length:
            raise ValueError(
                f"The captions of `{store.path}` were cut at {length} tokens, `max_length` is {options.max_length}. "
                "Leave `max_length` out, or give another `store`."
            )
    if stores:
        _on_first_process(lambda: _check_weights(options, stores))


def _check_weights(options: Any, stores: "list[CaptionEmbeddingStore]") -> None:
    from ..data.store.fingerprint import require_identity

    llm = str(options.text_model or options.model)
    silent = [store for store in stores if "weights_sha256" not in store.fingerprint]
    for store in silent:
        logger.warning("`%s` does not record the weights of its LLM; that it is %r is not checked.", store.path, llm)
    stores = [store for store in stores if store not in silent]
    if not stores:
        return
    note = f"checking  the weights of {llm}, which take a while to read, against {stores[0].path}"
    print(note, file=sys.stderr, flush=True)
    try:
        identity = _weights_of(options, llm, stores[0].fingerprint.get("weights_dtype"))
    except OSError as error:
        logger.warning("The weights of %r cannot be read (%s); `%s` is not checked.", llm, error, stores[0].path)
        return
    if identity is None:
        logger.warning("%r holds no LLM, so that `%s` was made by its LLM is not checked.", llm, stores[0].path)
        return
    for store in stores:
        remedy = "Give the `text_model` that made them, or another `store`."
        require_identity(store, identity, repr(llm), remedy, maker="LLM")


def _weights_of(options: Any, llm: str, dtype: Any) -> dict[str, Any] | None:
    """The identity of the LLM's weights, loaded in the dtype that a store names; `None` for a model without LLM."""
    from transformers import AutoModel

    import llm2clip_hf  # noqa: F401  (registers the model type)

    from ..data.store.fingerprint import weights_identity
    from ..modeling.loading_llm2clip import load_pretrained_text, load_text_config

    kwargs = {"dtype": dtype} if dtype in ("float32", "bfloat16", "float16") else {}
    trust = options.trust_remote_code
    config = load_text_config(llm, {"trust_remote_code": trust})
    if config.model_type != "llm2clip":
        return weights_identity(load_pretrained_text(llm, None, kwargs))
    if config.text_weights == "none":
        return None
    model = AutoModel.from_pretrained(llm, trust_remote_code=trust, text_model_kwargs=kwargs)
    return weights_identity(model.text_model)


def _on_first_process(check: Callable[[], None]) -> None:
    """Runs a check on the first process and raises its error on all."""
    import torch.distributed as dist

    if not (dist.is_available() and dist.is_initialized()):
        if is_main_process():
            check()
        return
    problems: list[str | None] = [None]
    if dist.get_rank() == 0:
        try:
            check()
        except Exception as error:
            problems = [str(error)]
    # Otherwise the others would wait in the first step for a process that has ended.
    dist.broadcast_object_list(problems)
    if problems[0] is not None:
        raise ValueError(problems[0])
