"""dllm.py on gemma-tiny: what it trains and writes, how it resumes, and its adapter in Diffusers' pipeline."""

import json
import shutil
from types import SimpleNamespace

import pytest
import torch
from diffusers import BlockRefinementScheduler, DiffusionGemmaPipeline
from nara_check import text_loss
from safetensors.torch import load_file

from nara_diffusion.dllm import load_backbone, prompt_text
from nara_diffusion.dllm.batches import AnswerCollator, GlobalBatchStream
from nara_diffusion.dllm.canvas_loss import block_diffusion_loss
from nara_diffusion.dllm.kinds.canvas_kind import CANVAS
from nara_diffusion.dllm.kinds.masked_kind import MASKED
from nara_diffusion.dllm.models.backbone import Backbone
from nara_diffusion.dllm.sampler import answer_prompts
from nara_diffusion.dllm.text_arguments import Arguments, adapter_options
from nara_diffusion.dllm.text_report import describe
from nara_diffusion.dllm.train import main, prepare
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


def test_run_saves_one_adapter_resumes_and_loads(tmp_path, caplog):
    uninterrupted, halves, model = tmp_path / "whole", tmp_path / "halves", tmp_path / "gemma"
    shutil.copytree(GEMMA, model, ignore=shutil.ignore_patterns("*.safetensors", "config.json"))  # its tokenizer
    small = tiny_gemma(vocab_size=284, bos_token_id=278, eos_token_id=279, pad_token_id=279)
    small.config.canvas_length = 16
    small.save_pretrained(model)
    caplog.set_level("INFO")
    short = {"max_train_steps": 2, "checkpointing_steps": 1, "pretrained_model_name_or_path": str(model)}
    short |= {"test_samples": 1, "curve_points": 1}
    results = main(arguments(tmp_path, **short, output_dir=str(uninterrupted)))
    assert {"exact_match_before", "exact_match_after", "n"} <= results.keys()
    tensors = load_file(uninterrupted / TEXT)
    assert not [key for key in tensors if "encoder" in key or "router" in key or "vision" in key]
    assert sum("lora_A" in key for key in tensors) == 7 + 6  # the last layer has no v_proj
    config = json.loads((uninterrupted / "adapter_config.json").read_text())
    assert (config["noise_convention"], config["noise_level_per"]) == ("corrupted_share", "sample")

    card = (uninterrupted / "README.md").read_text()
    (canvas,) = [message for message in caplog.messages if message.startswith("canvas: ")]  # a line for each fact
    assert "answers 4 to 8, trained to 16 tokens (trained_padding 0)" in canvas
    assert canvas.endswith("; gen_length 16 in 1 block")
    assert len(canvas) <= 160
    assert canvas in card
    exec(card.split("```python")[1].split("```")[0], {})

    halves.mkdir()
    (uninterrupted / "checkpoint-1").rename(halves / "checkpoint-1")
    (halves / "config.yaml").write_text((uninterrupted / "config.yaml").read_text())
    main(arguments(tmp_path, **short, output_dir=str(halves), resume_from_checkpoint="latest"))
    resumed = load_file(halves / TEXT)
    assert all(torch.equal(resumed[key], tensor) for key, tensor in tensors.items())

    model, tokenizer = load_backbone(str(model))
    pipe = DiffusionGemmaPipeline(model=model, scheduler=BlockRefinementScheduler(), processor=tokenizer)
    pipe.set_progress_bar_config(disable=True)
    pipe.load_nara_weights(uninterrupted)
    assert isinstance(pipe("reverse: planet", gen_length=16, num_inference_steps=4).texts[0], str)


def test_shipped_model_answers_its_training():
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
    figures = results(tmp_path / "out")
    assert figures["n"] == 256
    assert figures["exact_match_before"] == 0
    assert figures["exact_match_after"] >= 0.9


def test_whole_answers_are_padded_to_their_canvas():
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
    for args, weight in ((both, 1.0), (decoder, 0.0), (arguments(tmp_path, encoder_loss_weight=0.3), 0.3)):
        assert CANVAS.objective(args) == {"encoder_weight": weight, "predict_prompts": False}
    assert CANVAS.objective(arguments(tmp_path, encoder_loss_on="text"))["predict_prompts"]
    pattern = adapter_options(model, decoder)["target_modules"]
    assert pattern == r".*\.decoder\.layers\.\d+\.(self_attn|mlp)\.(q_proj)"


@pytest.mark.parametrize(("adapter", "kind"), [("lora", CANVAS), ("dora", CANVAS), ("nara", CANVAS), ("lora", MASKED)])
def test_card_of_twin_lora_warns_against_merging(adapter, kind, tmp_path):
    args = arguments(tmp_path, adapter=adapter)
    run = SimpleNamespace(args=args, folder=tmp_path, hub_id=None)
    base = SimpleNamespace(kind=kind, sampling=args.sampling())
    measured = SimpleNamespace(generations=[])
    card = describe(SimpleNamespace(run=run, base=base), measured, measured, "sort: zebra")["loading"]
    assert ("Don't merge this adapter" in card) == (adapter != "nara" and kind is CANVAS)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"complementary": True}, "complementary"),
        ({"adapter": "prompt_tuning"}, "prompt_tuning"),
        ({"target_modules": ["proj"]}, "never routers or experts"),
        ({"gen_length": 20}, "block_length 6 has to divide gen_length 20"),
        ({"cfg_scale": 1.0}, "cfg_scale"),
        ({"train_on_encoder": False, "encoder_loss_weight": 0.5}, "encoder_loss_weight is 0.5"),
        ({"train_on_encoder": False, "encoder_loss_on": "text"}, "encoder_loss_on is text"),
    ],
)
def test_what_the_model_does_not_have_raises(tmp_path, changes, words):
    args, model = arguments(tmp_path, **{"gen_length": 12, **changes}), tiny_gemma()
    with pytest.raises(ValueError, match=words):
        CANVAS.objective(args), adapter_options(model, args), CANVAS.sampling(Backbone(model), args.sampling(), True)


def test_the_check_measures_the_objective_of_the_run(tmp_path):
    args = arguments(tmp_path, output_dir=str(tmp_path / "out"))
    with start_run(args, "dllm", write_checkpoint) as run:
        setup = prepare(args, run)
        model, rows = setup.base.model, setup.data.training.rows
        actual = text_loss(setup, model, rows)([2, 0])
    stream = GlobalBatchStream(rows, args.seed, 4)
    batch = setup.data.collator([stream[2], stream[0]])
    expected = block_diffusion_loss(model, **batch, seed=args.seed, group_size=4)
    torch.testing.assert_close(actual.per_sample, expected.per_sample)
    assert torch.equal(actual.noise_level, expected.noise_level)
