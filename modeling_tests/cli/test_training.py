# SPDX-License-Identifier: Apache-2.0
"""The verbs of both stages, on tiny models: from captions on disk to a model that `AutoModel` loads."""

import errno
import json
import os
import shutil
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import tiny_models
import torch
from safetensors.torch import load_file, save_file
from shard_files import CAPTION_FIELDS, write_shards
from tiny_data import write_training_files
from transformers import AutoModel

from llm2clip_hf.cli import main as cli
from llm2clip_hf.cli import train_captions, train_clip
from llm2clip_hf.data import CaptionEmbeddingStore, load_captions, load_image_text
from llm2clip_hf.evaluation import evaluate_retrieval
from llm2clip_hf.training import build_caption_encoder


pytest.importorskip("sentence_transformers")

COMMON = ["--report_to", "none", "--disable_tqdm", "True", "--per_device_train_batch_size", "8", "--use_cpu", "True"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("verbs")
    write_training_files(path)
    return path


def run(*argv: object) -> None:
    assert cli.main([str(argument) for argument in argv]) == 0


def test_check_prints_the_plan_and_writes_nothing(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(
        "train-captions", "--llm", folder / "llm", "--captions", folder / "captions.jsonl", "--num_test_images", 4,
        "--output_dir", folder / "nothing", "--check", *COMMON,
    )  # fmt: skip
    text = capsys.readouterr().out
    rows = len(load_captions(folder / "captions.jsonl")) - 4
    assert f"captions: {rows} rows" in text
    assert f"steps     {rows // 8}, 8 pairs per step on 1 device(s)" in text
    assert "M trained" in text
    run(
        "train-clip", "--vision_model", folder / "vision", "--text_model", folder / "llm", "--data",
        folder / "train.parquet", "--output_dir", folder / "nothing", "--check", *COMMON,
    )  # fmt: skip
    assert "raw_caption, dense_caption" in capsys.readouterr().out
    assert not (folder / "nothing").exists()


@pytest.mark.slow
def test_from_captions_to_a_model(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = folder / "stage1.yaml"
    config.write_text(
        f"llm: {folder / 'llm'}\noutput_dir: {folder / 'cc'}\nnum_test_images: 4\nlora_r: 4\nwarmup_steps: 0\n"
        f"sources:\n  pairs: {{path: {folder / 'captions.jsonl'}, hard_negatives: true}}\n"
        f"  lines: {{kind: lines, path: {folder / 'lines.txt'}, instruction: 'Find the same.'}}\n"
    )
    (folder / "lines.txt").write_text("".join(f"The number of this long line is {n}.\n" for n in range(9)))
    run("train-captions", "--config", config, "--mntp_steps", 2, *COMMON)
    results = json.loads((folder / "cc" / "results.json").read_text())
    assert results["training"]["rows"]["lines"] == 9
    assert results["before"].keys() == results["after"].keys()
    assert "accuracy (CRA)" in capsys.readouterr().out
    assert AutoModel.from_pretrained(folder / "cc").config.is_causal is False

    # A finished folder is not written over.
    assert cli.main(["train-captions", "--config", str(config), *COMMON]) == 1
    assert "already holds a finished model" in capsys.readouterr().err

    run("embed-captions", "--llm", folder / "cc", "--data", folder / "train.parquet", "--output_dir", folder / "store")
    run("store", "verify", folder / "store")
    run(
        "train-clip", "--vision_model", folder / "vision", "--text_model", folder / "cc", "--data",
        folder / "train.parquet", "--test_data", folder / "train.parquet", "--store", folder / "store",
        "--caption_weights", "raw_caption=1", "dense_caption=0", "--projection_dim", 20, "--output_dir",
        folder / "clip", "--num_train_epochs", 1, "--text_weights", "bundled", *COMMON,
    )  # fmt: skip
    model = AutoModel.from_pretrained(folder / "clip")
    assert model.config.text_weights == "bundled"
    # The LLM in the model gives what was stored, and the recorded retrieval is that of the saved folder.
    store = CaptionEmbeddingStore.open(folder / "store")
    from transformers import AutoProcessor

    processor = AutoProcessor.from_pretrained(folder / "clip")
    store.check_compatible(model, processor.tokenizer)
    recorded = json.loads((folder / "clip" / "results.json").read_text())["test"]
    table = load_image_text(folder / "train.parquet")
    measured = evaluate_retrieval(model, table.images, table.captions, processor=processor)
    assert measured["image_to_text_recall@1"] == pytest.approx(recorded["image_to_text_recall@1"], abs=0.06)


def test_weights_that_are_all_trained_are_float32(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    llm = AutoModel.from_pretrained(folder / "llm")
    llm.bfloat16().save_pretrained(folder / "half")
    tiny_models.llama3_tokenizer().save_pretrained(folder / "half")
    options = ["--llm", folder / "half", "--captions", folder / "captions.jsonl", "--num_test_images", 0]
    options += ["--lora_r", 0, "--max_steps", 1, *COMMON]
    run("train-captions", *options, "--output_dir", folder / "whole")
    assert AutoModel.from_pretrained(folder / "whole").dtype == torch.float32
    refused = ["train-captions", *options, "--dtype", "bfloat16", "--output_dir", folder / "rounded"]
    assert cli.main([str(option) for option in refused]) == 1
    assert "are in half precision" in capsys.readouterr().err


@pytest.mark.slow
def test_stage_1_saved_as_adapters_goes_through_every_verb(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train = ["train-captions", "--captions", folder / "captions.jsonl", "--num_test_images", 0, "--max_steps", 1]
    train += ["--warmup_steps", 0, "--learning_rate", 0.05, *COMMON]
    first, second = folder / "adapters", folder / "more-adapters"
    run(*train, "--llm", folder / "llm", "--lora_r", 4, "--adapter_only", "--output_dir", first)
    run(*train, "--llm", first, "--adapter_only", "--output_dir", second, "--check")
    assert "LlamaModel" in capsys.readouterr().out
    run(*train, "--llm", first, "--adapter_only", "--output_dir", second)
    configs = [json.loads((path / "adapter_config.json").read_text()) for path in (first, second)]
    assert [config["r"] for config in configs] == [4, 4]
    assert configs[1]["base_model_name_or_path"] == str(folder / "llm")
    weights = [load_file(path / "adapter_model.safetensors") for path in (first, second)]
    assert any((weights[0][name] != weights[1][name]).any() for name in weights[0])
    for options, message in ((["--lora_r", 8], "has adapters of its own"), (["--mntp_steps", 1], "MNTP comes before")):
        assert cli.main([str(each) for each in [*train, "--llm", first, *options, "--output_dir", folder / "no"]]) == 1
        assert message in capsys.readouterr().err

    data, made = folder / "train.parquet", folder / "adapter-store"
    run("embed-captions", "--llm", second, "--data", data, "--output_dir", made)
    store = CaptionEmbeddingStore.open(made)
    encoder = build_caption_encoder(str(second), lora=None)
    text = load_image_text(data).captions.caption(0)
    torch.testing.assert_close(store[0][0].float(), torch.tensor(encoder.encode(text)), atol=2e-3, rtol=2e-3)

    clip = ["train-clip", "--vision_model", folder / "vision", "--text_model", second, "--data", data]
    clip += ["--projection_dim", 20, "--max_steps", 1, *COMMON]
    run(*clip, "--store", made, "--output_dir", folder / "no", "--check")
    run(*clip, "--store", made, "--output_dir", folder / "of-adapters")
    run(*clip, "--text_mode", "online", "--text_weights", "bundled", "--output_dir", folder / "of-adapters-online")
    for name in ("of-adapters", "of-adapters-online"):
        model = AutoModel.from_pretrained(folder / name)
        for key, tensor in encoder.llm.state_dict().items():
            assert torch.equal(model.text_model.state_dict()[key], tensor), key
    evaluate = ["evaluate", "--tasks", data, "--device", "cpu", "--published", "False"]
    capsys.readouterr()
    run(*evaluate, "--model", folder / "of-adapters")
    table = capsys.readouterr().out
    run(*evaluate, "--model", folder / "of-adapters", "--text_model", second)
    assert capsys.readouterr().out == table
    assert cli.main([str(each) for each in [*evaluate, "--model", second]]) == 1
    assert "adapters of an LLM" in capsys.readouterr().err


SEEDED = {
    "train-captions": ["--llm", "{}/llm", "--captions", "{}/captions.jsonl", "--num_test_images", 0, "--lora_r", 4]
    + ["--mntp_steps", 1, "--warmup_steps", 0],
    "train-clip": ["--vision_model", "{}/vision", "--text_model", "{}/llm", "--data", "{}/train.parquet", "--store"]
    + ["{}/seeded-store", "--projection_dim", 20, "--train_vision", "lora"],
}


@pytest.mark.parametrize("verb", list(SEEDED))
def test_runs_of_one_seed_write_equal_files(folder: Path, verb: str) -> None:
    def files(name: str, seed: int) -> dict[str, bytes]:
        torch.manual_seed(len(name))  # what was drawn before a run must not matter
        options = [str(option).format(folder) for option in SEEDED[verb]]
        target = folder / name / "run"
        run(verb, *options, "--output_dir", target, "--max_steps", 2, "--seed", seed, "--save_strategy", "no", *COMMON)
        # Not among them, since they hold paths and times.
        left_out = ("results.json", "training_args.bin", "trainer_state.json")
        found = [file for file in target.rglob("*") if file.is_file() and file.name not in left_out]
        return {str(file.relative_to(target)): file.read_bytes() for file in found}

    first, again, other = (files(f"{verb}-{name}", seed) for name, seed in (("a", 7), ("bb", 7), ("ccc", 8)))
    assert first.keys() == again.keys()
    # The folder of MNTP is named in the files of what was made of it.
    differing = {name for name in first if first[name].replace(b"-a/", b"-bb/") != again[name]}
    assert not differing
    assert first["model.safetensors"] != other["model.safetensors"]


@pytest.mark.slow
def test_training_on_tar_shards(folder: Path) -> None:
    shards = write_shards(folder, [9, 7])
    fields = [f"{source}={field}" for source, field in CAPTION_FIELDS.items()]
    run(
        "train-clip", "--vision_model", folder / "vision", "--text_model", folder / "llm", "--shards",
        folder / "{000..001}.tar", "--caption_fields", *fields, "--store", folder / "shard-store",
        "--projection_dim", 20, "--output_dir", folder / "shard-clip", "--max_steps", 3, *COMMON,
    )  # fmt: skip
    assert len(shards) == 2
    store = CaptionEmbeddingStore.open(folder / "shard-store")
    assert (len(store), store.index_of("00015"), store.source_names) == (16, 15, ("real", "dense"))
    model = AutoModel.from_pretrained(folder / "shard-clip", load_text_model=False)
    embeds = model.get_text_features(llm_embeds=store[3].float()).pooler_output
    assert torch.isfinite(embeds).all()


def test_max_length_is_that_of_the_batches() -> None:
    processor = tiny_models.processor()
    sample = {"pixel_values": torch.zeros(3, 4, 4), "text": "a red boat on the sea " * 200}
    for length, expected in ((None, 512), (40, 40)):
        options = train_clip.TrainClipOptions(max_length=length)
        collator = train_clip.collator_and_clip_text(options, tiny_models.model("clip"), processor)["data_collator"]
        assert collator([sample])["input_ids"].shape == (1, expected)


@pytest.mark.parametrize("failing", [None, "write", "rename"])
def test_bundled_model_replaces_the_external_one_whole_or_not_at_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: str | None
) -> None:
    model = tiny_models.model("clip")
    model.text_model.save_pretrained(tmp_path / "llm")
    model.config.text_base_model, model.config.text_weights = str(tmp_path / "llm"), "external"
    target = tmp_path / "model"
    model.save_pretrained(target)
    (target / "checkpoint-2").mkdir()
    before = {file.name: file.read_bytes() for file in target.iterdir() if file.is_file()}

    def full(*arguments: Any, **kwargs: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    if failing == "write":

        def half(tensors: Any, filename: Any, *others: Any, **kwargs: Any) -> None:
            Path(filename).write_bytes(b"\x00" * 100)
            full()

        monkeypatch.setattr("transformers.modeling_utils.safe_save_file", half)
    elif failing == "rename":
        monkeypatch.setattr(os, "replace", full)
    if failing is None:
        train_clip.bundle(train_clip.TrainClipOptions(), str(target))
    else:
        with pytest.raises(OSError, match="No space left"):
            train_clip.bundle(train_clip.TrainClipOptions(), str(target))
        assert {file.name: file.read_bytes() for file in target.iterdir() if file.is_file()} == before
    monkeypatch.undo()
    assert [path.name for path in target.iterdir() if path.is_dir()] == ["checkpoint-2"]
    shutil.move(tmp_path / "llm", tmp_path / ("llm" if failing else "elsewhere"))
    reloaded = AutoModel.from_pretrained(target)
    assert reloaded.config.text_weights == ("external" if failing else "bundled")
    expected = model.state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in reloaded.state_dict().items())


@pytest.mark.parametrize(
    "argv, message",
    [
        (["train-captions", "--llm", "x"], "Give either `captions` or, in a config file, `sources`"),
        (["train-clip", "--data", "x"], "Give either `model`"),
        (["train-clip", "--vision_model", "v", "--data", "x"], "`text_model` is missing"),
        (["train-clip", "--model", "m", "--data", "x", "--train_text", "lora"], "Set `text_mode=online`"),
        (["train-clip", "--model", "m", "--data", "x", "--integration", "both"], "Give both or neither"),
        (["train-clip", "--model", "m", "--data", "x", "--clip_text_model", "c"], "Give both or neither"),
        (
            ["train-clip", "--model", "m", "--shards", "x", "--integration", "both", "--clip_text_model", "c"],
            "Give `data`",
        ),
        (["train-clip", "--model", "m", "--shards", "x.tar"], "`shards` need `caption_fields`"),
        (["embed-captions", "--llm", "x"], "`--output_dir` is missing"),
        (["embed-captions", "--llm", "x", "--output_dir", "o"], "Give one of `data`"),
        (["store", "verify", "nowhere"], "no caption embedding store"),
        (["store", "append", "store"], "`--others` is needed by `append`"),
        (["store", "info", "store", "--llm", "x"], "`--llm` has no effect on `llm2clip store info`"),
        (["store", "sell", "store"], "ACTION must be one of merge, verify, repair, append, info"),
        (["embed-captions", "--llm", "x", "--output_dir", "o", "--shard_range", "3"], "Give one of `data`"),
    ],
)
def test_options_that_do_not_go_together(
    argv: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    extra = ["--output_dir", "out", "--use_cpu", "True"] if argv[0].startswith("train") else []
    assert cli.main([*argv, *extra]) == 1
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_embedding_with_the_llm_of_a_whole_model(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, processor = tiny_models.model(), tiny_models.processor()
    processor.tokenizer.model_max_length = 24
    model.save_pretrained(folder / "whole")
    processor.save_pretrained(folder / "whole")
    captions = [["a long caption " * 30], ["a short one"]]
    (folder / "long.jsonl").write_text("".join(json.dumps({"captions": row}) + "\n" for row in captions))
    argv = ["embed-captions", "--llm", folder / "whole", "--captions", folder / "long.jsonl", "--device", "cpu"]
    run(*argv, "--output_dir", folder / "whole-store", "--store_dtype", "float32")
    store = CaptionEmbeddingStore.open(folder / "whole-store")
    # What the processor of the model cuts off is cut off here.
    batch = processor(text=[row[0] for row in captions])
    torch.testing.assert_close(store.gather([0, 1]), model.get_llm_embeds(**batch).float(), atol=1e-5, rtol=0)
    run(*argv, "--output_dir", folder / "half-store", "--dtype", "bfloat16")
    half = CaptionEmbeddingStore.open(folder / "half-store")
    assert half.fingerprint["weights_dtype"] == "bfloat16"
    assert cli.main([str(each) for each in [*argv, "--output_dir", folder / "none", "--template", "none"]]) == 1
    assert "whose tokenizer brings its own" in capsys.readouterr().err


def test_unknown_settings_of_a_source_are_named(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = folder / "bad.yaml"
    config.write_text(f"llm: x\noutput_dir: {folder / 'bad'}\nsources: {{a: {{path: p, hard_negative: true}}}}\n")
    assert cli.main(["train-captions", "--config", str(config)]) == 1
    assert "Source `a` of kind `captions` has no setting ['hard_negative']" in capsys.readouterr().err


@pytest.mark.slow
def test_standard_output_holds_the_result_alone(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = [
        "train-clip", "--vision_model", folder / "vision", "--text_model", folder / "llm", "--data",
        folder / "train.parquet", "--projection_dim", 20, "--output_dir", folder / "quiet", "--max_steps", 2,
        "--logging_steps", 1, *COMMON,
    ]  # fmt: skip
    run(*argv)
    captured = capsys.readouterr()
    assert captured.out == f"written   {folder / 'quiet'}\n"
    assert "'loss'" in captured.err


def unfinished(folder: Path, marker: str) -> None:
    """As a kill between the last checkpoint and the saving of the model leaves it."""
    (folder / marker).unlink()
    assert list(folder.glob("checkpoint-*"))


def same_weights(one: Path, two: Path) -> bool:
    first, second = (load_file(path / "model.safetensors") for path in (one, two))
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


@pytest.fixture
def stage1(folder: Path, tmp_path: Path) -> list[object]:
    """A stage-1 run, killed after its last checkpoint."""
    shutil.copytree(folder / "llm", tmp_path / "llm")
    shutil.copy(folder / "captions.jsonl", tmp_path / "captions.jsonl")
    argv = [
        "train-captions", "--llm", tmp_path / "llm", "--captions", tmp_path / "captions.jsonl", "--num_test_images", 0,
        "--output_dir", tmp_path / "cc", "--max_steps", 3, "--save_steps", 2, "--warmup_steps", 0, "--lora_r", 4,
        *COMMON,
    ]  # fmt: skip
    run(*argv)
    shutil.copytree(tmp_path / "cc", tmp_path / "whole")
    unfinished(tmp_path / "cc", "modules.json")
    shutil.rmtree(tmp_path / "cc" / "checkpoint-3")
    return argv


def test_rerun_after_a_kill_continues_the_same_run(stage1: list[object], tmp_path: Path) -> None:
    recorded = json.loads((tmp_path / "cc" / "run.json").read_text())
    assert (recorded["learning_rate"], recorded["lora_r"], recorded["pairs_per_batch"]) == (2e-4, 4, 8)
    assert recorded["source captions"]["sha256"] == load_captions(tmp_path / "captions.jsonl").sha256
    # What does not change the course of a run may change, and files may have moved.
    shutil.move(tmp_path / "llm", tmp_path / "elsewhere")
    changed = [tmp_path / "elsewhere" if value == tmp_path / "llm" else value for value in stage1]
    state = tmp_path / "cc" / "checkpoint-2" / "trainer_state.json"
    state.write_text(json.dumps(json.loads(state.read_text()) | {"log_history": [{"step": 1, "mark": 5}]}))
    run(*changed, "--logging_steps", 1, "--report_to", "none")
    assert json.loads((tmp_path / "cc" / "checkpoint-3" / "trainer_state.json").read_text())["log_history"][0]["mark"]
    assert same_weights(tmp_path / "cc", tmp_path / "whole")
    unfinished(tmp_path / "cc", "modules.json")
    run(*changed, "--mini_batch_size", 4)
    unfinished(tmp_path / "cc", "modules.json")
    run(*changed, "--resume_from_checkpoint", "none")  # from the beginning
    state = tmp_path / "cc" / "checkpoint-3" / "trainer_state.json"
    assert not any("mark" in entry for entry in json.loads(state.read_text())["log_history"])


OTHER_RUNS = {
    "learning_rate": ["--learning_rate", "0.001"],
    "max_steps": ["--max_steps", "5"],
    "seed": ["--seed", "7"],
    "lora_r": ["--lora_r", "2"],
    "template": ["--template", "none"],
    "scale": ["--scale", "20"],
    "mntp_steps": ["--mntp_steps", "1"],
    "pairs_per_batch": ["--per_device_train_batch_size", "4"],
    "source captions": ["--hard_negatives"],
}


def test_folder_of_another_run_is_refused(
    stage1: list[object], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def refused(*options: object) -> str:
        assert cli.main([str(value) for value in (*stage1, *options)]) == 1
        return capsys.readouterr().err

    for name, options in OTHER_RUNS.items():
        told = refused(*options)
        assert f"holds checkpoints of another run: `{name}` was " in told, told
        assert "Choose another `--output_dir`" in told
        assert "`learning_rate`" not in told or name == "learning_rate"
    assert "of another run: `seed` was 42 and is 7" in refused("--seed", 7, "--resume_from_checkpoint", "last")
    assert "of another run: `seed`" in refused("--seed", 7, "--check")

    weights = load_file(tmp_path / "llm" / "model.safetensors")
    name = next(iter(weights))
    save_file(weights | {name: weights[name] + 1}, tmp_path / "llm" / "model.safetensors", {"format": "pt"})
    assert "of another run: `llm` was" in refused()
    save_file(weights, tmp_path / "llm" / "model.safetensors", {"format": "pt"})
    lines = (tmp_path / "captions.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "captions.jsonl").write_text("".join([*lines[1:], lines[0]]))
    assert "of another run: `source captions` was" in refused()
    (tmp_path / "captions.jsonl").write_text("".join(lines))

    (tmp_path / "cc" / "run.json").unlink()
    assert "left no `run.json`" in refused()
    run(*stage1, "--resume_from_checkpoint", "last")
    assert same_weights(tmp_path / "cc", tmp_path / "whole")


def test_mntp_of_another_run_is_never_used(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = [
        "train-captions", "--llm", folder / "llm", "--captions", folder / "captions.jsonl", "--num_test_images", 0,
        "--output_dir", tmp_path / "cc", "--max_steps", 1, "--mntp_steps", 1, "--lora_r", 4, *COMMON,
    ]  # fmt: skip

    def killed(*args: object, **kwargs: object) -> None:
        raise ValueError("killed")

    with monkeypatch.context() as patch:
        patch.setattr("llm2clip_hf.training.build_caption_encoder", killed)
        assert cli.main([str(value) for value in argv]) == 1
    capsys.readouterr()
    assert (tmp_path / "cc" / "mntp" / "config.json").is_file()
    for options in (["--mntp_steps", "2"], ["--seed", "3"]):
        assert cli.main([str(value) for value in (*argv, *options)]) == 1
        assert f"of another run: `{options[0][2:]}` was" in capsys.readouterr().err
    monkeypatch.setattr("llm2clip_hf.training.MNTPTrainer", killed)  # which this run has behind it
    run(*argv)


def test_stage_2_knows_its_run(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = [
        "train-clip", "--vision_model", folder / "vision", "--text_model", folder / "llm", "--data",
        folder / "train.parquet", "--projection_dim", 20, "--output_dir", tmp_path / "clip", "--max_steps", 3,
        "--save_steps", 2, *COMMON,
    ]  # fmt: skip
    run(*argv)
    shutil.copytree(tmp_path / "clip", tmp_path / "whole")
    unfinished(tmp_path / "clip", "config.json")
    shutil.rmtree(tmp_path / "clip" / "checkpoint-3")
    for name, options in {
        "vision_layer_decay": ["--vision_layer_decay", 0.5],
        "projection_dim": ["--projection_dim", 16],
        "text_model": ["--text_model", folder / "vision"],
        "data": ["--caption_columns", "raw_caption"],
        "caption_weights": ["--caption_weights", "raw_caption=1", "dense_caption=0"],
        "pairs_per_step": ["--gradient_accumulation_steps", 2],
    }.items():
        assert cli.main([str(value) for value in (*argv, *options)]) == 1
        assert f"of another run: `{name}` was" in capsys.readouterr().err
    run(*argv, "--per_device_eval_batch_size", 4)
    assert same_weights(tmp_path / "clip", tmp_path / "whole")


def test_splits_are_those_of_the_options(folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    rows = pq.read_table(folder / "train.parquet")
    names = {"train": rows.slice(0, 16), "validation": rows.slice(16, 3), "test": rows.slice(15, 4)}
    for name, part in names.items():
        pq.write_table(part, tmp_path / f"{name}.parquet")
    data = str(tmp_path)

    def clip(**options: Any) -> list[int]:
        tables = train_clip.load_tables(train_clip.TrainClipOptions(**options))
        return [len(table) for table in tables if table is not None]

    def captions(**options: Any) -> list[int]:
        train, test = train_captions.load_sources(
            train_captions.TrainCaptionsOptions(llm="", num_test_images=0, **options), seed=0
        )
        return [*map(len, train.values()), len(test)]

    assert clip(data=data) == [16] and captions(captions=data) == [16, 0]
    assert not caplog.records
    for load, name, message in ((clip, "data", "images of the test data"), (captions, "captions", "captions of the")):
        caplog.clear()
        assert load(**{name: data, f"test_{name}": data}) == [16, 4]
        assert message in caplog.text and "are in the training data too" in caplog.text
        assert load(**{name: data, "test_split": "validation"}) == [16, 3]
        assert load(**{name: data, "split": "validation", "test_split": "train"}) == [3, 16]
        assert load(**{name: str(tmp_path / "test.parquet"), f"test_{name}": str(folder / "train.parquet")})[0] == 4
        with pytest.raises(ValueError, match="no split 'dev'"):
            load(**{name: data, "split": "dev"})
        with pytest.raises(ValueError, match="no split 'eval'"):
            load(**{name: data, "test_split": "eval"})
    with pytest.raises(ValueError, match="`--split` and `--subset` are of `--data`"):
        clip(shards=["*.parquet"], split="train")
    run(
        "embed-captions", "--llm", folder / "llm", "--data", tmp_path, "--output_dir", tmp_path / "store", "--split",
        "validation",
    )  # fmt: skip
    assert CaptionEmbeddingStore.open(tmp_path / "store").num_images == 3


def test_jobs_that_know_nothing_of_each_other_make_a_store(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made, other = folder / "sliced", folder / "other"
    options = ["--llm", folder / "llm", "--data", folder / "train.parquet", "--rows_per_shard", 5, "--device", "cpu"]
    run("embed-captions", *options, "--output_dir", made, "--shard_range", "1:4")
    assert "written   shards 1:4 of 4" in capsys.readouterr().out
    assert cli.main(["store", "merge", str(made)]) == 1
    assert "Rows 0 to 5 of 20 are missing" in capsys.readouterr().err
    run("embed-captions", *options, "--output_dir", other, "--shard_range", "0:1")
    run("store", "merge", made, "--others", other)
    assert "shards    4, 0.00 GiB" in capsys.readouterr().out
    run("embed-captions", *options, "--output_dir", folder / "at-once")
    names = {file.name for file in made.iterdir()}
    assert names == {file.name for file in (folder / "at-once").iterdir()}
    for name in names:
        assert (made / name).read_bytes() == (folder / "at-once" / name).read_bytes()
    shard = made / "embeddings-00002.safetensors"
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    assert cli.main(["store", "verify", str(made)]) == 1
    assert "do not match their SHA-256: ['embeddings-00002.safetensors']" in capsys.readouterr().err
    run("store", "repair", made, *options)
    assert shard.read_bytes() == whole
    run("store", "append", made, "--others", folder / "at-once")
    capsys.readouterr()
    run("store", "info", made)
    text = capsys.readouterr().out
    assert "of 40 images" in text and "shards    8" in text and "made by   weights_sha256" in text
