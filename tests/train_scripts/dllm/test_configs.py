"""The configurations of the paper's runs: each is parsed, built at tiny size with the true classes, and trained."""

from dataclasses import replace
from pathlib import Path

import pytest
from peft import PeftModel

from nara_diffusion.dllm import load_backbone
from nara_diffusion.dllm.models.shifted_logits import ShiftedQwen2ForCausalLM
from nara_diffusion.training.arguments.cli import parse_arguments
from nara_diffusion.training.batches import accumulation_steps
from train_scripts.dllm import Arguments, main

FOLDER = Path(__file__).parents[3] / "train_scripts" / "configs"
CONFIGS = sorted(path for path in FOLDER.glob("*.yaml") if path.stem.startswith(("llada_", "dream_")))
MODELS = {
    "llada_base": "GSAI-ML/LLaDA-8B-Base",
    "llada_instruct": "GSAI-ML/LLaDA-8B-Instruct",
    "dream": "Dream-org/Dream-v0-Instruct-7B",
}
# domain: (learning rate, epochs), as released
DOMAINS = {"math14k": (1e-4, 10), "commonsense170k": (1e-5, 1), "code_feedback": (1e-4, 1)}


def test_there_is_one_for_each_run() -> None:
    expected = {f"{model}_{domain}" for model in ("llada_base", "llada_instruct") for domain in DOMAINS}
    assert {path.stem for path in CONFIGS} == expected | {"dream_math14k"}


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_released_hyper_parameters(path: Path) -> None:
    args = parse_arguments(Arguments, ["--config", str(path)])
    model, _, domain = path.stem.rpartition("_") if "code" not in path.stem else path.stem.rpartition("_code")
    domain = "code_feedback" if domain == "_feedback" else domain
    assert args.pretrained_model_name_or_path == MODELS[model]
    assert (args.learning_rate, args.num_train_epochs) == DOMAINS[domain]
    assert args.max_train_steps is None
    assert (args.rank, args.lora_alpha, args.lora_dropout, args.core_scale) == (32, 32, 0.05, 0.1)
    assert (args.core_hidden_dims, args.core_init, args.noise_embedding) == ([256, 512], "zero_last", "fourier")
    assert args.target_modules == ["q_proj", "k_proj", "v_proj", "o_proj"]
    assert (args.train_batch_size, args.global_batch_size, args.max_length) == (1, 32, 512)
    assert [accumulation_steps(args, processes) for processes in (1, 2, 4, 8)] == [32, 16, 8, 4]
    assert (args.mixed_precision, args.lr_warmup_steps, args.validation_samples) == ("fp16", 0.05, 128)
    assert (args.generation_steps, args.gen_length, args.block_length) == (32, 512, 16)
    assert (args.temperature, args.remasking) == (0.0, "low_confidence")


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_it_takes_two_steps_at_tiny_size(path: Path, arguments, llada_folder, dream_folder, data) -> None:
    full = parse_arguments(Arguments, ["--config", str(path)])
    tiny = arguments()
    folder = dream_folder if path.stem.startswith("dream") else llada_folder
    args = replace(
        full,
        pretrained_model_name_or_path=str(folder),
        train_file=data["train_file"],
        test_file=data["test_file"] if full.test_file else None,
        validation_samples=4,
        max_train_steps=2,
        global_batch_size=2,
        mixed_precision="no",  # fp16 needs a GPU
        output_dir=tiny.output_dir,
        logging_steps=1,
        # 32 blocks of one step each, as released, but shorter ones
        gen_length=full.gen_length // 16,
        block_length=full.block_length // 16,
    )
    results = main(args)
    assert results["n"] == (5 if full.test_file else 4)
    model, _ = load_backbone(str(folder))
    assert isinstance(model, ShiftedQwen2ForCausalLM) == path.stem.startswith("dream")
    loaded = PeftModel.from_pretrained(model, args.output_dir)
    assert loaded.peft_config["default"].r == 32
