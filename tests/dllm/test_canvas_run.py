"""dllm.py on gemma-tiny: what it trains and writes, how it resumes, and its adapter in Diffusers' pipeline."""

import json
from types import SimpleNamespace

import pytest
import torch
from diffusers import BlockRefinementScheduler, DiffusionGemmaPipeline
from nara_check import text_loss
from safetensors.torch import load_file

from nara_diffusion.dllm import load_backbone, prompt_text
from nara_diffusion.dllm.batches import AnswerCollator, GlobalBatchStream
from nara_diffusion.dllm.block_loss import block_diffusion_loss
from nara_diffusion.dllm.decoding import model_sampling
from nara_diffusion.dllm.sampler import answer_prompts
from nara_diffusion.dllm.text_arguments import Arguments, adapter_options, objective_options
from nara_diffusion.dllm.text_report import describe
from nara_diffusion.dllm.train import FineTuning, main
from nara_diffusion.training.adapter_weights import write_checkpoint
from nara_diffusion.training.run import start_run
from tests.acceptance._commands import ROOT, results, run
from tests.acceptance._runs import ASSETS, TEXT, text_flags
from tests.helpers.tiny_gemma import tiny_gemma

GEMMA = ASSETS / "gemma-tiny"
pytestmark = pytest.mark.filterwarnings("ignore:.*past_key_values.*:FutureWarning")


def arguments(folder, **changes):
    flags = text_flags(folder) | {
        "pretrained_model_name_or_path": str(GEMMA),
        "target_modules": ["all-linear"],
        "lora_dropout": 0.0,
        "max_train_steps": 4,
        "gen_length": 16,
        **changes,
    }
    return Arguments(**{name: str(value) if name.endswith("_file") else value for name, value in flags.items()})


def test_a_run_saves_one_adapter_resumes_to_the_same_bits_and_loads_into_the_pipeline(tmp_path, caplog):
    whole, halves = tmp_path / "whole", tmp_path / "halves"
    caplog.set_level("INFO")
    results = main(arguments(tmp_path, output_dir=str(whole)))
    assert {"exact_match_before", "exact_match_after", "n"} <= results.keys()
    tensors = load_file(whole / TEXT)
    assert not [key for key in tensors if "encoder" in key or "router" in key or "vision" in key]
    assert sum("lora_A" in key for key in tensors) == 4 * 6 + 3  # the last layer has no v_proj
    config = json.loads((whole / "adapter_config.json").read_text())
    assert (config["noise_convention"], config["noise_level_per"]) == ("corrupted_share", "sample")

    card = (whole / "README.md").read_text()
    (canvas,) = [message for message in caplog.messages if message.startswith("canvas: ")]  # a line for each fact
    assert "answers 4 to 8, trained to 16 tokens (trained_padding 0)" in canvas
    assert canvas.endswith("; gen_length 16 in 1 block")
    assert len(canvas) <= 160
    assert canvas in card
    exec(card.split("```python")[1].split("```")[0], {})

    halves.mkdir()
    (whole / "checkpoint-2").rename(halves / "checkpoint-2")
    (halves / "config.yaml").write_text((whole / "config.yaml").read_text())
    main(arguments(tmp_path, output_dir=str(halves), resume_from_checkpoint="latest"))
    resumed = load_file(halves / TEXT)
    assert all(torch.equal(resumed[key], tensor) for key, tensor in tensors.items())

    model, tokenizer = load_backbone(str(GEMMA))
    pipe = DiffusionGemmaPipeline(model=model, scheduler=BlockRefinementScheduler(), processor=tokenizer)
    pipe.set_progress_bar_config(disable=True)
    pipe.load_nara_weights(whole)
    assert isinstance(pipe("reverse: planet", gen_length=16, num_inference_steps=8).texts[0], str)


def test_the_shipped_model_answers_what_it_was_trained_on():
    model, tokenizer = load_backbone(str(GEMMA))
    questions = ["reverse: planet", "upper: planet", "sort: zebra"]
    prompts = [tokenizer(prompt_text(tokenizer, one), add_special_tokens=False)["input_ids"] for one in questions]
    ends = tokenizer.convert_tokens_to_ids(["<|eot_id|>", "<|endoftext|>"])
    options = {"eos_token_id": ends, "gen_length": 16, "generator": torch.Generator().manual_seed(0)}
    result = answer_prompts(model, prompts, **options)
    texts = tokenizer.batch_decode(result.answers, skip_special_tokens=True)
    assert texts == ["tenalp", "PLANET", "aberz"]
    assert 1 < result.forwards <= 16


@pytest.mark.slow
def test_the_shipped_run_learns_an_unseen_task(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    run("dllm.py", config=ROOT / "train_scripts" / "configs" / "diffusiongemma_tiny.yaml", output_dir=tmp_path / "out")
    found = results(tmp_path / "out")
    assert found["n"] == 256
    assert found["exact_match_before"] == 0
    assert found["exact_match_after"] >= 0.9


def test_whole_answers_are_padded_to_the_end_of_their_canvas():
    rows = [{"input_ids": [5] * 3 + [6] * 4 + [2], "prompt_length": 3}, {"input_ids": [5, 6, 2], "prompt_length": 1}]
    batch = AnswerCollator(2, trained_padding=0, multiple=4)(rows)
    assert batch["answer_lengths"] == [8, 4]
    cut = {"input_ids": [5] * 3 + [6] * 5, "prompt_length": 3}
    assert AnswerCollator(2, trained_padding=0, multiple=4).answer_lengths([cut]) == [5]


def test_options_choose_the_layers_and_the_encoders_loss(tmp_path):
    model = tiny_gemma()
    both, decoder = (
        arguments(tmp_path),
        arguments(tmp_path, train_on_encoder=False, target_modules=["q_proj"]),
    )
    assert objective_options(model, both) == {"encoder_weight": 1.0}
    assert objective_options(model, decoder) == {"encoder_weight": 0.0}
    assert objective_options(model, arguments(tmp_path, encoder_loss_weight=0.3)) == {"encoder_weight": 0.3}
    pattern = adapter_options(model, decoder)["target_modules"]
    assert pattern == r".*\.decoder\.layers\.\d+\.(self_attn|mlp)\.(q_proj)"


@pytest.mark.parametrize(("adapter", "multiple"), [("lora", 6), ("dora", 6), ("nara", 6), ("lora", 1)])
def test_the_card_of_a_plain_lora_on_twins_says_not_to_merge_it(adapter, multiple, tmp_path):
    args = arguments(tmp_path, adapter=adapter)
    run = SimpleNamespace(args=args, folder=tmp_path, hub_id=None)
    parts = {"run": run, "collator": SimpleNamespace(multiple=multiple), "sampling": args.sampling()}
    measured = SimpleNamespace(generations=[])
    card = describe(SimpleNamespace(**parts), measured, measured, "sort: zebra")["loading"]
    assert ("Don't merge this adapter" in card) == (adapter != "nara" and multiple > 1)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"complementary": True}, "complementary"),
        ({"adapter": "prompt_tuning"}, "prompt_tuning"),
        ({"target_modules": ["proj"]}, "never routers or experts"),
        ({"gen_length": 20}, "block_length 6 has to divide gen_length 20"),
        ({"cfg_scale": 1.0}, "cfg_scale"),
        ({"train_on_encoder": False, "encoder_loss_weight": 0.5}, "encoder_loss_weight is 0.5"),
    ],
)
def test_what_the_model_does_not_have_raises(tmp_path, changes, words):
    args, model = arguments(tmp_path, **{"gen_length": 12, **changes}), tiny_gemma()
    with pytest.raises(ValueError, match=words):
        objective_options(model, args), adapter_options(model, args), model_sampling(model, args.sampling(), chat=True)


def test_the_check_measures_the_objective_of_the_run(tmp_path):
    args = arguments(tmp_path, output_dir=str(tmp_path / "out"))
    with start_run(args, "dllm", write_checkpoint) as run:
        tuning = FineTuning(args, run)
        found = text_loss(tuning, tuning.backbone, tuning.train_rows)([2, 0])
    stream = GlobalBatchStream(tuning.train_rows, args.seed, 4)
    batch = tuning.collator([stream[2], stream[0]])
    expected = block_diffusion_loss(tuning.backbone, **batch, seed=args.seed, group_size=4)
    torch.testing.assert_close(found.per_sample, expected.per_sample)
    assert torch.equal(found.noise_level, expected.noise_level)
