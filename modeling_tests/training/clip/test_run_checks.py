# SPDX-License-Identifier: Apache-2.0
"""
No argument is passed over: each of the Trainer's options is used, refused or harmless, in each of the trainers.

A field or argument that a later transformers adds is in none of these sets, and fails here until it is looked at.
"""

import dataclasses
import inspect
from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch
from clip_training import Pairs, clip_baseline, stack
from sentence_transformers import SentenceTransformerTrainer
from transformers import AutoModelForCausalLM, Trainer

from llm2clip_hf.training import (
    CaptionContrastiveTrainer,
    CaptionContrastiveTrainingArguments,
    LLM2CLIPTrainer,
    LLM2CLIPTrainingArguments,
    MNTPTrainer,
    MNTPTrainingArguments,
    build_caption_encoder,
)
from llm2clip_hf.training.captions import arguments as caption_training_args
from llm2clip_hf.training.clip import arguments as clip_training_args
from llm2clip_hf.training.clip.checks import check_batch
from llm2clip_hf.training.run_checks import UNUSED_ARGUMENTS


STAGES = {
    "captions": (CaptionContrastiveTrainingArguments, caption_training_args._UNUSED_IN_STAGE_1),
    "mntp": (MNTPTrainingArguments, caption_training_args._UNUSED_IN_MNTP),
    "clip": (LLM2CLIPTrainingArguments, clip_training_args.UNUSED_OPTIONS),
}
TRAINERS = {"captions": CaptionContrastiveTrainer, "mntp": MNTPTrainer, "clip": LLM2CLIPTrainer}

# What `Trainer`, its optimizer, loaders, callbacks and accelerate do with an option holds in all trainers.
USED = set(
    """
    output_dir per_device_train_batch_size num_train_epochs max_steps learning_rate lr_scheduler_type
    lr_scheduler_kwargs warmup_steps warmup_ratio optim optim_args weight_decay adam_beta1 adam_beta2 adam_epsilon
    gradient_accumulation_steps max_grad_norm bf16 fp16 bf16_full_eval fp16_full_eval tf32 activation_checkpointing
    activation_checkpointing_kwargs gradient_checkpointing gradient_checkpointing_kwargs torch_compile
    torch_compile_backend torch_compile_mode torch_empty_cache_steps auto_find_batch_size logging_strategy
    logging_steps logging_first_step log_on_each_node log_level log_level_replica disable_tqdm report_to run_name
    project trackio_space_id trackio_bucket_id trackio_static_space_id eval_strategy eval_steps eval_delay
    per_device_eval_batch_size prediction_loss_only eval_on_start eval_use_gather_object eval_accumulation_steps
    save_only_model save_strategy save_steps save_on_each_node save_total_limit enable_jit_checkpoint push_to_hub
    hub_token hub_private_repo hub_model_id hub_strategy hub_always_push hub_revision load_best_model_at_end
    metric_for_best_model greater_is_better ignore_data_skip restore_callback_states_from_checkpoint full_determinism
    seed data_seed use_cpu accelerator_config dataloader_drop_last dataloader_num_workers dataloader_pin_memory
    dataloader_persistent_workers dataloader_prefetch_factor dataloader_multiprocessing_context dataloader_in_order
    ddp_find_unused_parameters ddp_bucket_cap_mb ddp_broadcast_buffers ddp_static_graph ddp_backend ddp_timeout fsdp
    fsdp_config deepspeed debug skip_memory_metrics
    """.split()
)
# `average_tokens_across_devices`: a loss that is no mean of tokens is averaged in any case.
# `logging_nan_inf_filter`: a loss that is not finite ends the run. `local_rank` is set by the launcher. The others are
# for the script around the trainer.
HARMLESS = set("average_tokens_across_devices logging_nan_inf_filter local_rank".split())
HARMLESS |= set("do_train do_eval do_predict resume_from_checkpoint".split())
# Refused by the trainer, which knows the metrics, the sizes of the plan or the sampling of the stage.
CHECKED = {"parallelism_config", "train_sampling_strategy"}
ONLY = {
    "captions": USED
    | HARMLESS
    | CHECKED
    # Nothing is removed from rows whose unknown columns are refused.
    | {"remove_unused_columns", "optim_target_modules", "prompts", "batch_sampler", "multi_dataset_batch_sampler"}
    | {"learning_rate_mapping"},
    "mntp": USED
    | HARMLESS
    | CHECKED
    | set("optim_target_modules label_smoothing_factor use_liger_kernel liger_kernel_config".split())
    | set("neftune_noise_alpha include_num_input_tokens_seen".split())
    | set("eval_do_concat_batches batch_eval_metrics include_for_metrics".split()),
    "clip": USED
    | HARMLESS
    | CHECKED
    | set("label_smoothing_factor neftune_noise_alpha remove_unused_columns".split())
    | set("eval_do_concat_batches batch_eval_metrics include_for_metrics".split()),
}
OTHER_VALUES: dict[str, Any] = {
    "label_names": ["rating"],
    "liger_kernel_config": {"rope": True},
    "include_num_input_tokens_seen": "all",
    "length_column_name": "tokens",
    "optim_target_modules": ["q_proj"],
    "router_mapping": {"anchor": "query"},
    "include_for_metrics": ["loss"],
    "label_smoothing_factor": 0.1,
    "neftune_noise_alpha": 5.0,
    "eval_do_concat_batches": False,
}


def options(folder: Path, **kwargs: Any) -> dict[str, Any]:
    given = {"per_device_train_batch_size": 5, "max_steps": 1, "report_to": "none", "disable_tqdm": True}
    return {"output_dir": str(folder), "save_strategy": "no", "use_cpu": True, **given, **kwargs}


@pytest.mark.parametrize("stage", STAGES)
def test_every_option_is_used_refused_or_harmless(stage):
    cls, unused = STAGES[stage]
    own = {name for base in cls.__mro__[:1] for name in base.__annotations__}
    inherited = {
        field.name for base in cls.__mro__[1:] if dataclasses.is_dataclass(base) for field in dataclasses.fields(base)
    }
    unknown = inherited - ONLY[stage] - set(unused)
    assert not unknown, f"look at what {cls.__name__} does with {sorted(unknown)}"
    assert not set(unused) & ONLY[stage]
    assert not own & set(unused) - {"remove_unused_columns"}


CASES = [
    (stage, name) for stage, (cls, unused) in STAGES.items() for name in unused if name in cls.__dataclass_fields__
]


@pytest.mark.parametrize(("stage", "name"), CASES)
def test_option_without_effect_is_refused(tmp_path, stage, name):
    with pytest.raises(ValueError, match=f"`{name}` is .*has no effect on `{STAGES[stage][0].__name__}`"):
        STAGES[stage][0](**options(tmp_path, **{name: OTHER_VALUES.get(name, True)}))


@pytest.mark.parametrize("stage", STAGES)
def test_arguments_survive_their_own_dictionary(tmp_path, stage):
    cls = STAGES[stage][0]
    first = cls(**options(tmp_path))
    again = cls(**{field.name: getattr(first, field.name) for field in dataclasses.fields(cls) if field.init})
    assert again.learning_rate == first.learning_rate


def test_options_that_depend_on_others_are_refused(tmp_path):
    cases = {
        "`neftune_noise_alpha` is 5.0": {"neftune_noise_alpha": 5.0},
        "`train_sampling_strategy` must be": {"train_sampling_strategy": "group_by_length"},
        r"`label_smoothing_factor` must lie in \[0, 1\]": {"label_smoothing_factor": 1.5},
    }
    for message, given in cases.items():
        with pytest.raises(ValueError, match=message):
            LLM2CLIPTrainingArguments(**options(tmp_path, **given))
    assert LLM2CLIPTrainingArguments(**options(tmp_path, train_text="lora", neftune_noise_alpha=5.0))


# ------------------------------------------------------------------------------------------- arguments of the trainers


# Each is handed on, and used, by the constructors of the trainers.
USED_ARGUMENTS = set(
    "model args data_collator train_dataset eval_dataset processing_class callbacks optimizers "
    "optimizer_cls_and_kwargs loss evaluator compute_metrics preprocess_logits_for_metrics".split()
)


@pytest.mark.parametrize("base", [Trainer, SentenceTransformerTrainer])
def test_every_argument_of_the_trainer_is_used_or_refused(base):
    names = set(inspect.signature(base.__init__).parameters) - {"self"}
    unknown = names - USED_ARGUMENTS - set(UNUSED_ARGUMENTS)
    assert not unknown, f"look at what our trainers do with {sorted(unknown)}"


def clip_trainer(folder: Path, collator: Any = stack, model: Any = None, given: Any = None, **kwargs: Any):
    model = model or tiny_models.model("clip", text=None)
    args = LLM2CLIPTrainingArguments(**options(folder, **kwargs))
    return LLM2CLIPTrainer(model, args, data_collator=collator, train_dataset=Pairs(), **(given or {}))


@pytest.fixture
def llms(llm_dir: str, lm_dir: str) -> tuple[str, str]:
    return llm_dir, lm_dir


ROWS = [{"anchor": f"a boat {i}", "positive": f"the boat {i}"} for i in range(10)]


class Rows(list):
    """A map-style source."""


def trainer_of(stage: str, folder: Path, llms: tuple[str, str], given: dict[str, Any], **kwargs: Any) -> Any:
    if stage == "clip":
        return clip_trainer(folder, given=given, **kwargs)
    args = STAGES[stage][0](**options(folder, **kwargs))
    if stage == "mntp":
        return MNTPTrainer(llms[1], args, ["a red boat on the sea"] * 6, **given)
    import datasets

    return CaptionContrastiveTrainer(build_caption_encoder(llms[0]), args, datasets.Dataset.from_list(ROWS), **given)


def metrics(prediction: Any) -> dict[str, float]:
    return {}


@pytest.mark.parametrize("stage", STAGES)
def test_arguments_without_effect_are_refused(tmp_path, llms, stage):
    mask = {"mask_token": "x"} if stage == "mntp" else {}
    cases: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
        ("`model_init` has no effect.*neither `model_init` nor `hyperparameter_search`", {"model_init": object}, {})
    ]
    if stage == "captions":
        cases += [
            ("`compute_metrics` has no effect", {"compute_metrics": metrics}, {}),
            ("`preprocess_logits_for_metrics` has", {"preprocess_logits_for_metrics": metrics}, {}),
            ("`processing_class` has no effect", {"processing_class": tiny_models.llama3_tokenizer()}, {}),
            ("`prompts` is set", {"data_collator": stack}, {"prompts": {"anchor": "query: "}}),
        ]
    else:
        cases += [
            ("`compute_loss_func` has no effect", {"compute_loss_func": metrics}, {}),
            ("`compute_metrics` has no.*`predict", {"compute_metrics": metrics}, {"prediction_loss_only": True}),
            ("`eval_do_concat_batches` is False", {}, {"eval_do_concat_batches": False}),
            (r"`include_for_metrics` is \['loss'\]", {}, {"include_for_metrics": ["loss"]}),
        ]
    if stage == "mntp":
        loaded = AutoModelForCausalLM.from_pretrained(llms[1])
        with pytest.raises(ValueError, match=r"`model_kwargs` \(\['dtype'\]\) are for loading"):
            MNTPTrainer(
                loaded,
                MNTPTrainingArguments(**options(tmp_path)),
                processing_class=tiny_models.llama3_tokenizer(),
                model_kwargs={"dtype": torch.float32},
            )
    for message, given, kwargs in cases:
        with pytest.raises(ValueError, match=message):
            trainer_of(stage, tmp_path, llms, given, **mask, **kwargs)


@pytest.mark.parametrize("stage", STAGES)
def test_tensor_parallelism_is_refused(tmp_path, llms, stage, monkeypatch):
    from accelerate import Accelerator

    plan = type("Plan", (), {"tp_size": 2, "cp_size": 1, "sp_size": 1, "sp_backend": None})
    create = Trainer.create_accelerator_and_postprocess

    def with_plan(self: Any) -> None:
        create(self)
        monkeypatch.setattr(Accelerator, "parallelism_config", property(lambda self: plan), raising=False)

    monkeypatch.setattr(Trainer, "create_accelerator_and_postprocess", with_plan)
    with pytest.raises(ValueError, match="`tp_size` of `parallelism_config` is 2"):
        trainer_of(stage, tmp_path, llms, {}, **({"mask_token": "x"} if stage == "mntp" else {}))


# ------------------------------------------------------------------------------------------------- entries of a batch


@pytest.mark.parametrize(
    ("text", "extra"),
    [
        ("llm_embeds", {"rating": torch.ones(5)}),
        ("llm_embeds", {"attention_mask": torch.ones(5, 6)}),  # of stored embeddings there is nothing to mask
        ("llm_embeds", {"clip_input_ids": torch.ones(5, 6)}),  # with `integration="replace"`
        ("input_ids", {"labels": torch.ones(5)}),
    ],
)
def test_extra_entries_of_a_batch_are_refused(tmp_path, text, extra):
    model = tiny_models.model("clip", text="llama" if text == "input_ids" else None)
    (name,) = extra
    trainer = clip_trainer(tmp_path, model=model)
    batch = stack([Pairs(text=text)[i] for i in range(5)])
    assert trainer.compute_loss(model, batch).isfinite()
    with pytest.raises(ValueError, match=rf"The batch has \['{name}'\], which LLM2CLIPModel takes no notice of"):
        trainer.compute_loss(model, batch | extra)  # in any batch, not the first alone
    with pytest.raises(ValueError, match=r"\['interpolate_pos_encoding'\] of the batch are no tensors"):
        trainer.compute_loss(model, batch | {"interpolate_pos_encoding": True})


def test_entries_that_a_model_takes_are_no_extra_ones(tmp_path):
    batch = {"pixel_values": torch.ones(2, 4, 12), "llm_embeds": torch.ones(2, tiny_models.TEXT_WIDTH)}
    batch |= {
        "pixel_attention_mask": torch.ones(2, 4),
        "spatial_shapes": torch.full((2, 2), 2),
        "index": torch.ones(2),
    }
    args = LLM2CLIPTrainingArguments(**options(tmp_path))
    check_batch(tiny_models.model("clip", text=None), batch, args)
    clip = clip_baseline()  # with a text encoder of its own, which has other entries
    texts = {"input_ids": torch.ones(2, 3), "attention_mask": torch.ones(2, 3), "position_ids": torch.ones(2, 3)}
    check_batch(clip, {"pixel_values": torch.ones(2, 3, 30, 30)} | texts, args)
    with pytest.raises(ValueError, match=r"\['llm_embeds'\], which CLIPModel takes no notice of"):
        check_batch(clip, {"pixel_values": torch.ones(2, 3, 30, 30), "llm_embeds": torch.ones(2, 32)} | texts, args)


def test_positions_of_a_batch_reach_a_frozen_llm(tmp_path):
    model = tiny_models.model("clip", text="llama")
    batch = stack([Pairs(text="input_ids")[i] for i in range(5)])
    batch["position_ids"] = torch.arange(6).flip(0).expand(5, 6)
    embeds = clip_trainer(tmp_path, model=model).compute_loss(model, batch, return_outputs=True)[1]
    text = {name: value for name, value in batch.items() if name not in ("pixel_values", "index")}
    torch.testing.assert_close(embeds["text_embeds"], model.eval()(**text).text_embeds)


def test_extra_entries_of_a_caption_batch_are_refused(tmp_path, llms):
    trainer = trainer_of("captions", tmp_path, llms, {})
    batch = next(iter(trainer.get_train_dataloader()))
    assert trainer.compute_loss(trainer.model, dict(batch)).isfinite()
    with pytest.raises(ValueError, match=r"The batch has \['weight'\], which belong to no column"):
        trainer.compute_loss(trainer.model, batch | {"weight": torch.ones(5)})


# --------------------------------------------------------------------------------------------------- label smoothing


def test_label_smoothing_is_that_of_cross_entropy(tmp_path):
    model = tiny_models.model("clip", text=None)
    batch = stack([Pairs()[i] for i in range(5)])
    loss = clip_trainer(tmp_path, model=model, label_smoothing_factor=0.2).compute_loss(model, batch)
    logits = model(pixel_values=batch["pixel_values"], llm_embeds=batch["llm_embeds"]).logits_per_image.double()
    entropy = torch.nn.CrossEntropyLoss(label_smoothing=0.2)
    rows = torch.arange(5)
    assert loss.item() == pytest.approx(((entropy(logits, rows) + entropy(logits.T, rows)) / 2).item(), abs=1e-5)
    sigmoid = tiny_models.model("clip", text=None, logit_bias_init_value=-1.0)
    with pytest.raises(ValueError, match=r"`label_smoothing` \(0.2\) has no effect on the sigmoid loss"):
        clip_trainer(tmp_path, model=sigmoid, label_smoothing_factor=0.2)


def test_label_smoothing_of_masked_tokens_is_that_of_cross_entropy(tmp_path, llms):
    trainer = trainer_of("mntp", tmp_path, llms, {}, mask_token="x", label_smoothing_factor=0.3)
    model = trainer.model.eval()
    batch = trainer.data_collator([trainer.train_dataset[i] for i in range(5)])
    with torch.no_grad():
        loss = trainer.compute_loss(model, batch)
        logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1].double()
    entropy = torch.nn.CrossEntropyLoss(ignore_index=-100, label_smoothing=0.3)
    assert loss.item() == pytest.approx(
        entropy(logits.flatten(0, 1), batch["labels"][:, 1:].flatten()).item(), abs=1e-5
    )
