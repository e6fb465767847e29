"""The makers of the models: short runs write a model that loads, and a stopped run goes on to the same weights."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from unittest.mock import Mock

import make_clip_tiny
import make_kontext_tiny
import make_pairs
import make_sd_tiny_flow
import make_sdxl_tiny
import pytest
import torch
from diffusers import DiffusionPipeline
from PIL import Image

from nara_diffusion.dllm import load_backbone
from tests.helpers.rounding import assert_near

pytestmark = pytest.mark.slow
CLIP = {"text_width": 32, "text_layers": 2, "vision_width": 32, "vision_layers": 2, "retrieval_batches": 1}
CLIP |= {"train_batch_size": 6, "lr_warmup_steps": 2, "save_steps": 2}
TEXT = {"train_batch_size": 6, "train_size": 40, "validation_size": 2}
LESS = {"scenes": 6, "held_out": 3, "save_steps": 3, "evaluation_batches": 1, "inference_steps": 1}


@pytest.mark.parametrize("family", ["llada", "dream"])
def test_make_llada_tiny_resumed_gives_the_same_weights(family, tmp_path, monkeypatch):
    make = pytest.importorskip("make_llada_tiny")
    sizes = {**TEXT, "lr_warmup_steps": 2, "validation_steps": 3, "checkpointing_steps": 2, "decay_share": 0.6}

    def run(name: str, **changes: object) -> None:
        make.main(make.Arguments(output_dir=tmp_path / name, family=family, max_train_steps=5, **sizes, **changes))

    run("whole")
    step_loss = make.PreTraining.step_loss
    with monkeypatch.context() as patch:
        stop = Mock(side_effect=KeyboardInterrupt)
        patch.setattr(make.PreTraining, "step_loss", lambda run, now: (stop if now.step == 3 else step_loss)(run, now))
        with pytest.raises(KeyboardInterrupt):
            run("stopped")
    with pytest.raises(ValueError, match="add --resume"):
        run("stopped")
    run("stopped", resume=True)
    uninterrupted, stopped = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("whole", "stopped"))
    assert uninterrupted == stopped
    assert load_backbone(tmp_path / "whole")[0].config.mask_token_id is not None


@pytest.mark.parametrize(
    ("name", "options"), [("make_uniform_tiny", {}), ("make_llada2_tiny", {}), ("make_llada2_tiny", {"family": "sdar"})]
)
def test_maker_writes_a_backbone(name, options, tmp_path):
    make = pytest.importorskip(name)
    results = make.main(make.Arguments(output_dir=tmp_path, max_train_steps=2, **TEXT, **options))
    assert results["steps"] == 2
    assert load_backbone(tmp_path)[0].config.mask_token_id is not None


def test_make_gemma_tiny_writes_a_model_of_canvases(tmp_path):
    make = pytest.importorskip("make_gemma_tiny")
    results = make.main(make.Arguments(output_dir=tmp_path, max_train_steps=2, **TEXT))
    assert results["steps"] == 2
    assert load_backbone(tmp_path)[0].config.canvas_length == 16


def test_gemma_tinys_fast_step_matches_the_plain_one():
    make = pytest.importorskip("make_gemma_tiny")
    torch.manual_seed(5)
    model, runs, steps = make.build_gemma(make.build_tokenizer()), [], []
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))  # norms' weights too
    model.model.encoder.language_model.register_forward_hook(lambda *_: runs.append(1))
    ids = torch.randint(5, 280, (3, 25), generator=torch.Generator().manual_seed(1))
    options = {"answer_lengths": [16, 16, 16], "seed": 3, "sample_indices": [4, 5, 6], "self_conditioning": 1.0}
    for is_fast in (False, True):
        if is_fast:
            make.fast_norms(model)
        with make.encoding_once(model) if is_fast else nullcontext():
            loss = make.block_diffusion_loss(model, ids, [4, 9, 7], **options)
        loss.loss.backward()
        gradients = {name: weight.grad for name, weight in model.named_parameters() if weight.grad is not None}
        steps.append({"decoder": loss.per_sample, "encoder": loss.encoder_loss, **gradients})
        model.zero_grad()
    assert len(runs) == 2 + 1
    assert steps[0].keys() == steps[1].keys()
    for name, expected in steps[0].items():
        assert_near(steps[1][name], expected, model)


def test_make_sdxl_tiny_writes_two_unequal_clips(tmp_path):
    clips = {"clip_smaller": tmp_path / "smaller", "clip": tmp_path / "clip"}
    for width, folder in zip((32, 48), clips.values(), strict=True):
        options = {**CLIP, "text_width": width, "output_dir": folder, "max_train_steps": 2}
        make_clip_tiny.main(make_clip_tiny.Arguments(**options))
    steps = {"vae_steps": 2, "decoder_steps": 2, "vae_batch_size": 2, "unet_steps": 4, "unet_batch_size": 4}
    sizes = {**steps, "unet_late_batch_size": 6, "unet_decay_steps": 2}
    results = make_sdxl_tiny.main(make_sdxl_tiny.Arguments(output_dir=tmp_path / "sdxl", **clips, **sizes, **LESS))
    assert results["validation_loss"] > 0
    assert DiffusionPipeline.from_pretrained(tmp_path / "sdxl").text_encoder_2.config.hidden_size == 48


def test_make_sd_tiny_flow_writes_a_pipeline(tmp_path):
    sizes = {"layers": 2, "heads": 1, "steps": 4, "decay_steps": 2, "batch_size": 2, "late_batch_size": 3}
    results = make_sd_tiny_flow.main(make_sd_tiny_flow.Arguments(output_dir=tmp_path, **sizes, **LESS))
    assert results["validation_loss"] > 0
    DiffusionPipeline.from_pretrained(tmp_path, text_encoder_3=None, tokenizer_3=None)


@pytest.mark.filterwarnings("ignore:Mismatch dtype between input and weight:UserWarning")  # of FLUX under autocast
def test_make_kontext_tiny_writes_a_pipeline(tmp_path):
    sizes = {"layers": 1, "heads": 1, "steps": 4, "decay_steps": 2, "batch_size": 2, "pairs": 6}
    options = {**sizes, "held_out": 3, "save_steps": 3}
    results = make_kontext_tiny.main(make_kontext_tiny.Arguments(output_dir=tmp_path, **options))
    assert results["validation_loss"] > 0
    pipe = DiffusionPipeline.from_pretrained(tmp_path)
    words = [pipe.tokenizer_2(prompt).input_ids for prompt in ("make it blue", "remove it")]
    assert pipe.tokenizer_2.unk_token_id not in words[0] + words[1]


def test_make_pairs_draws_the_shipped_pairs(tmp_path):
    make_pairs.main(make_pairs.Arguments(output_dir=tmp_path))
    shipped = Path(make_pairs.__file__).parents[1] / "pairs"
    for path in tmp_path.rglob("*.png"):
        with Image.open(path) as drawn, Image.open(shipped / path.relative_to(tmp_path)) as file:
            assert drawn.tobytes() == file.tobytes()
