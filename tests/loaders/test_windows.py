"""Adapters for windows of λ, loaded in one call: half-open, all or none, saved as one file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, WanPipeline
from peft import LoraConfig, get_peft_model_state_dict

import nara_command
from nara_diffusion.strict import adapter_tensors
from tests.acceptance._lives import assert_far, assert_near, fill, frozen_sd, predict, save_nara
from tests.helpers.adapted import nara_config
from tests.helpers.denoisers import denoiser, inputs_of, run
from tests.helpers.tlora_files import SETTINGS, lycoris_file, saved

EDGE = torch.tensor([699, 700, 1000])
"""Timesteps around λ = .7; 1000 is λ = 1."""


def tensors_of(pipe: Any) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in pipe.unet.state_dict().items()}


def save_lora(pipe: Any, component: str, folder: Path, **changes: Any) -> Path:
    """The file of a filled LoRA with an alpha other than its rank, as Diffusers saves it."""
    config = LoraConfig(**{"r": 2, "lora_alpha": 5, "target_modules": ["to_k", "to_v"], **changes})
    model = getattr(pipe, component)
    model.add_adapter(config)
    fill(model, seed=6)
    layers = {f"{component}_lora_layers": get_peft_model_state_dict(model)}
    pipe.save_lora_weights(folder, **layers, **{f"{component}_lora_adapter_metadata": config.to_dict()})
    return folder / "pytorch_lora_weights.safetensors"


@pytest.fixture
def sources(tmp_path: Path) -> tuple[Path, Path]:
    """A NaRA and a plain LoRA of other modules and rank, with an alpha other than its rank."""
    return save_nara(tmp_path / "nara"), save_lora(frozen_sd(), "unet", tmp_path / "lora")


def test_windows_at_edge_run_one_adapter_each(sources: Any, tmp_path: Path) -> None:
    nara_folder, lora = sources
    pipe: Any = frozen_sd()
    pipe.load_nara_weights([(nara_folder, (0.7, 1)), (lora, (0, 0.7))], "pair")
    assert pipe.get_active_adapters() == ["pair_0", "pair_1"]
    only_nara, only_lora = frozen_sd(), frozen_sd()
    only_nara.load_nara_weights(nara_folder)
    only_lora.load_lora_weights(lora)
    late, early = predict(only_nara, EDGE), predict(only_lora, EDGE)
    expected = torch.cat([early[:1], late[1:]])
    assert_near(predict(pipe, EDGE), expected, pipe.unet)
    assert_far(late, early)

    pipe.save_nara_weights(tmp_path / "one", ["pair_0", "pair_1"])
    again: Any = frozen_sd()
    again.load_nara_weights(tmp_path / "one")
    assert again.get_active_adapters() == ["default_0", "default_1"]
    assert_near(predict(again, EDGE), expected, pipe.unet)
    with pytest.raises(ValueError, match="several"):
        again.load_nara_weights(tmp_path / "one", "default_0", hotswap=True)
    again.set_adapters("default_1")
    again.delete_adapters("default_0")
    again.unload_nara_weights()
    assert_near(predict(again, EDGE), predict(frozen_sd(), EDGE), pipe.unet)


def test_convert_splits_windows_of_one_file(sources: Any, tmp_path: Path) -> None:
    pipe: Any = frozen_sd()
    pipe.load_nara_weights([(source, (0.2, 0.6)) for source in sources])
    pipe.save_nara_weights(tmp_path / "one", ["default_0", "default_1"])
    with pytest.raises(SystemExit, match="nara convert --component"):
        nara_command.main(["fold", str(tmp_path / "one"), str(tmp_path / "x.safetensors"), "--noise_level", "0.3"])
    nara_command.main(
        ["convert", str(tmp_path / "one"), str(tmp_path / "peft"), "--to", "peft", "--component", "unet#1"]
    )
    only: Any = frozen_sd()
    only.load_nara_weights(tmp_path / "peft")
    pipe.set_adapters("default_1")
    assert_near(predict(only, EDGE), predict(pipe, EDGE), pipe.unet)


def test_windows_after_an_error_leave_the_pipeline_unchanged(sources: Any, tmp_path: Path) -> None:
    nara_folder, lora = sources
    pipe: Any = frozen_sd()
    present = tensors_of(pipe)
    text = save_nara(tmp_path / "text", text=True)
    other = LoraConfig(r=2, target_modules=["to_k"])
    window = save_nara(tmp_path / "window", strength=[[0.0, 0.5]])
    for second, message in (
        (tmp_path / "nowhere", "no file or folder"),
        (text, "text_encoder, which runs before there is a λ"),
        (window, "has a strength over λ already"),
    ):
        with pytest.raises(ValueError, match=message):
            pipe.load_nara_weights([(lora, (0.5, 1)), (nara_folder, (0.5, 1)), (second, (0, 0.5))])
    for windows, message in (
        ([], "empty"),
        ([(lora, (0.5, 0.5))], "0 ≤ low < high ≤ 1"),
        ([(lora, 0.5)], "pairs of a file and its bounds"),
        ([lora], "pairs of a file and its bounds"),
        ([({"unet.x": torch.ones(1)}, (0, 1))], "pairs of a file and its bounds"),
    ):
        with pytest.raises(ValueError, match=message):
            pipe.load_nara_weights(windows)
    with pytest.raises(ValueError, match="several"):
        pipe.load_nara_weights([(lora, (0, 1))], hotswap=True)
    with pytest.raises(ValueError, match="metadata is for a dict of tensors"):
        pipe.load_nara_weights([(nara_folder, (0, 1))], metadata={})
    assert not pipe.get_list_adapters()
    assert tensors_of(pipe).keys() == present.keys()
    assert not hasattr(pipe.unet, "peft_config")
    pipe.unet.add_adapter(other, "x_1")
    with pytest.raises(ValueError, match="'x_1' is a duplicate"):
        pipe.load_nara_weights([(lora, (0.5, 1)), (lora, (0, 0.5))], "x")
    assert pipe.get_list_adapters() == {"unet": ["x_1"]}


def wan(boundary_ratio: float | None = 0.5) -> Any:
    transformers = [denoiser("WanTransformer3DModel") for _ in range(2)]
    return WanPipeline(
        tokenizer=None,  # type: ignore[arg-type]
        text_encoder=None,  # type: ignore[arg-type]
        vae=None,  # type: ignore[arg-type]
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        transformer=transformers[0],
        transformer_2=transformers[1],
        boundary_ratio=boundary_ratio,
    )


def test_tlora_starts_from_the_factors_of_each_transformer(tmp_path: Path) -> None:
    pipe, low = wan(), wan(None)
    pipe.transformer_2.blocks[0].attn1.to_q.weight.data.mul_(-0.7).add_(0.1)
    low.transformer = pipe.transformer_2  # the same base, in the place that files without a window go to
    folder = saved(tmp_path, lycoris_file(pipe.transformer, ["blocks.0.attn1.to_q"]), SETTINGS)
    low.load_nara_weights(folder, "only")
    expected = {key: value.clone() for key, value in adapter_tensors(low.transformer, "only").items()}
    low.unload_nara_weights()
    pipe.load_nara_weights([(folder, (0, 1))], "w")
    found = [adapter_tensors(getattr(pipe, name), "w_0") for name in ("transformer", "transformer_2")]
    assert found[1].keys() == expected.keys()
    assert all(torch.equal(value, expected[key]) for key, value in found[1].items())
    assert any(not torch.equal(value, expected[key]) for key, value in found[0].items())


def test_windows_of_wan_go_into_their_transformer(tmp_path: Path) -> None:
    lora = save_lora(wan(), "transformer", tmp_path / "lora")
    trained, source = wan(), tmp_path / "nara"
    trained.transformer.add_adapter(nara_config(target_modules=["to_k"]), "default")
    fill(trained.transformer, seed=5)
    trained.save_nara_weights(source)
    pipe, again, single = wan(), wan(), wan()
    windows = [(lora, (0.5, 1)), (source, (0.2, 0.5)), (lora, (0, 0.2)), (source, (0.4, 0.6))]
    pipe.load_nara_weights(windows, "w")
    assert list(pipe.transformer.peft_config) == ["w_0", "w_3"]
    assert list(pipe.transformer_2.peft_config) == ["w_1", "w_2", "w_3"]
    assert pipe.transformer.active_adapters() == ["w_0", "w_3"]
    pipe.save_nara_weights(tmp_path / "one", [f"w_{number}" for number in range(4)])
    again.load_nara_weights(tmp_path / "one")
    single.load_lora_weights(lora)
    single.load_lora_weights(lora, load_into_transformer_2=True)
    inputs = inputs_of("WanTransformer3DModel")
    for loaded in (pipe, again):
        for component, timestep in (("transformer", 900), ("transformer_2", 100)):
            outputs = [run(getattr(model, component), inputs, torch.tensor([timestep])) for model in (loaded, single)]
            assert_near(outputs[0], outputs[1], pipe.transformer)
