"""Hotswap: weights replaced in place, of equal rank and other scales; compiled models run on."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from nara_diffusion import TimestepNoise, register_core, set_noise_source
from nara_diffusion.cores import registry as custom_cores
from nara_diffusion.noise.level import find_holders
from tests.helpers.small_pipelines import pixels, small_sdxl
from tests.loaders.adapters import FILE, State, predict, save_lora, trained

TARGETS = ["to_q", "to_v", "conv1", "proj_out"]


def save(folder: Any, seed: int, **changes: Any) -> Any:
    trained(seed=seed, **{"target_modules": TARGETS, "text": False, **changes}).save_nara_weights(folder)
    return folder


def fresh(folder: Any) -> torch.Tensor:
    pipe = small_sdxl()
    pipe.load_nara_weights(folder)
    return predict(pipe)


def test_the_swapped_adapter_is_the_one_loaded_afresh(tmp_path):
    first = save(tmp_path / "1", 1, text=True)
    second = save(tmp_path / "2", 2, text=True, core_scale=0.3, lora_alpha=7, alpha_pattern={"to_q": 2})
    pipe = small_sdxl()
    pipe.load_nara_weights(first, "x")
    parameters = {name: id(parameter) for name, parameter in pipe.unet.named_parameters()}
    state = State(pipe).parts["unet"]
    before = predict(pipe)
    pipe.load_nara_weights(second, "x", hotswap=True)
    assert {name: id(parameter) for name, parameter in pipe.unet.named_parameters()} == parameters
    for kind in ("modules", "identities", "trainable", "attributes", "hooks", "adapters"):
        assert State(pipe).parts["unet"][kind] == state[kind]
    after = predict(pipe)
    assert torch.equal(after, fresh(second))
    afresh = small_sdxl()
    afresh.load_nara_weights(second)
    assert torch.equal(pixels(pipe), pixels(afresh))  # of the text encoders' parts too
    assert not torch.allclose(after, before, atol=1e-2)
    assert pipe.unet.peft_config["x"].core_scale == 0.3
    pipe.set_adapters("x")  # begins at the new scales
    assert torch.equal(predict(pipe), after)
    pipe.save_nara_weights(tmp_path / "3")
    expected, actual = load_file(second / FILE), load_file(tmp_path / "3" / FILE)
    assert actual.keys() == expected.keys()
    assert all(torch.equal(actual[key], expected[key]) for key in expected)
    pipe.load_nara_weights(first, "x", hotswap=True)
    assert torch.equal(predict(pipe), before)


def test_what_does_not_fit_is_refused_before_anything_is_changed(tmp_path):
    first = save(tmp_path / "1", 1)
    pipe = small_sdxl()
    pipe.load_nara_weights(first, "x")
    before = State(pipe)
    for number, (changes, message) in enumerate(
        [
            ({"r": 5}, r"r is 5 in the new adapter, and 4 in 'x' of unet.*load it without hotswap under another name"),
            ({"rank_pattern": {"to_v": 2}}, r"rank_pattern is \{'to_v': 2\} in the new adapter"),
            ({"core_hidden_dims": (9, 11)}, r"core_hidden_dims is \(9, 11\) in the new adapter, and \(9, 10\) in 'x'"),
            ({"core_type": "constant"}, r"core_type is 'constant'.*load it without hotswap under another name"),
            ({"use_dora": True}, r"use_dora is True"),
            ({"target_modules": [*TARGETS, "to_k"]}, r"adapt different modules \('.*to_k.lora_A.weight' is in one"),
        ]
    ):
        other = save(tmp_path / f"other{number}", 2, **changes)
        with pytest.raises(ValueError, match=message):
            pipe.load_nara_weights(other, "x", hotswap=True)
        assert before == State(pipe)
    save_lora(tmp_path / "lora")
    mixed = small_sdxl()
    mixed.load_lora_weights(tmp_path / "lora", adapter_name="x")
    with pytest.raises(ValueError, match=r"'x' of unet is a LoRA, or not there"):
        mixed.load_nara_weights(first, "x", hotswap=True)
    with pytest.raises(ValueError, match=r"Incompatible PEFT types found: NARA and LORA"):
        pipe.load_lora_weights(tmp_path / "lora", adapter_name="x", hotswap=True)
    for target in (2, 6):
        other = small_sdxl()
        other.enable_lora_hotswap(target_rank=target)
        before = State(other)
        with pytest.raises(ValueError, match=rf"target_rank={target}, but 'default_0'.* has rank 4: .*pass that"):
            other.load_nara_weights(first)
        assert before == State(other)


def test_a_swap_that_would_leave_parts_of_the_old_adapter_is_refused(tmp_path):
    both, alone = save(tmp_path / "both", 1, text=True), save(tmp_path / "alone", 2)
    pipe = small_sdxl()
    pipe.load_nara_weights(both, "x")
    before = State(pipe)
    with pytest.raises(
        ValueError,
        match=r"new adapter has no part for 'text_encoder', 'text_encoder_2', where 'x' has one that would stay.*"
        r"pipe.delete_adapters\('x'\), then load without hotswap",
    ):
        pipe.load_nara_weights(alone, "x", hotswap=True)
    assert before == State(pipe)
    pipe.delete_adapters("x")  # as the message says
    pipe.load_nara_weights(alone, "x")
    afresh = small_sdxl()
    afresh.load_nara_weights(alone, "x")
    assert torch.equal(pixels(pipe), pixels(afresh))
    before = State(pipe)
    with pytest.raises(ValueError, match=r"'x' of text_encoder is a LoRA, or not there"):
        pipe.load_nara_weights(both, "x", hotswap=True)
    assert before == State(pipe)


def stated_and_silent(folder: Any) -> list[dict[str, Any]]:
    """Arguments of loading an adapter that names its convention of λ, "timestep", and of one that names none."""
    with safe_open(folder / FILE, "pt") as file:
        stated = file.metadata()
    content = json.loads(stated["nara_adapter_metadata"])
    assert content["components"]["unet"].pop("noise_convention") == "timestep"
    metadata = (stated, {**stated, "nara_adapter_metadata": json.dumps(content)})
    tensors = load_file(folder / FILE)
    return [{"pretrained_model_name_or_path_or_dict": tensors, "metadata": each} for each in metadata]


def test_the_convention_is_that_of_the_adapter_that_came_in(tmp_path):
    stated, silent = stated_and_silent(save(tmp_path / "1", 1))
    pipe = small_sdxl()
    pipe.load_nara_weights(**silent, adapter_name="x")
    pipe.load_nara_weights(**stated, adapter_name="x", hotswap=True)
    with pytest.raises(ValueError, match="'x' was trained with λ defined as 'timestep', but the source of λ tells"):
        set_noise_source(pipe.unet, TimestepNoise("edm"))
    pipe.load_nara_weights(**silent, adapter_name="x", hotswap=True)
    set_noise_source(pipe.unet, TimestepNoise("edm"))
    (holder,) = find_holders(pipe.unet)
    assert pipe.unet.peft_config["x"].noise_convention == holder.conventions.by_adapter["x"] == "edm"
    before = State(pipe)
    with pytest.raises(ValueError, match="'x' was trained with λ defined as 'timestep', but the source of λ tells"):
        pipe.load_nara_weights(**stated, adapter_name="x", hotswap=True)
    assert before == State(pipe)


class Slope(nn.Module):
    """C(λ) = I + η λ P, whose η is of the configuration."""

    def __init__(self, config: Any, rank: int) -> None:
        super().__init__()
        self.P = nn.Parameter(torch.randn(rank, rank))
        self.eta = config.core_scale

    def forward(self, noise_level: Tensor) -> Tensor:
        return torch.eye(len(self.P)) + self.eta * noise_level[:, None, None] * self.P


def test_a_custom_core_that_reads_the_configuration_is_that_of_the_new_one(tmp_path, monkeypatch):
    monkeypatch.setattr(custom_cores, "_custom", {})
    register_core("slope", Slope)
    first = save(tmp_path / "1", 1, core_type="slope", core_scale=0.7)
    second = save(tmp_path / "2", 2, core_type="slope", core_scale=0.1)
    pipe = small_sdxl()
    pipe.load_nara_weights(first, "x")
    before, state = predict(pipe), State(pipe).parts["unet"]
    parameters = {name: id(parameter) for name, parameter in pipe.unet.named_parameters()}
    random = torch.get_rng_state()
    pipe.load_nara_weights(second, "x", hotswap=True)
    assert torch.equal(torch.get_rng_state(), random)
    assert torch.equal(predict(pipe), fresh(second))
    assert not torch.allclose(predict(pipe), before, atol=1e-2)
    assert {name: id(parameter) for name, parameter in pipe.unet.named_parameters()} == parameters
    for kind in ("modules", "trainable", "training", "attributes"):
        assert State(pipe).parts["unet"][kind] == state[kind]
    pipe.load_nara_weights(first, "x", hotswap=True)
    assert torch.equal(predict(pipe), before)


def test_a_custom_core_of_another_shape_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(custom_cores, "_custom", {})
    register_core("slope", Slope)
    pipe = small_sdxl()
    pipe.load_nara_weights(save(tmp_path / "1", 1, core_type="slope"), "x")
    before = State(pipe)

    class Row(Slope):
        def __init__(self, config: Any, rank: int) -> None:
            super().__init__(config, rank)
            self.P = nn.Parameter(torch.randn(1, rank))

        def forward(self, noise_level: Tensor) -> Tensor:
            return torch.eye(self.P.shape[1]) + noise_level[:, None, None] * self.P

    register_core("slope", Row)
    other = save(tmp_path / "2", 2, core_type="slope")
    with pytest.raises(
        ValueError, match=r"core.*P' has shape \(4, 4\).*needs \(1, 4\)|core.*P' has shape \(1, 4\).*needs \(4, 4\)"
    ):
        pipe.load_nara_weights(other, "x", hotswap=True)
    assert before == State(pipe)


@pytest.mark.filterwarnings("ignore:Already found a `peft_config` attribute")
def test_swapping_a_lora_beside_a_nara(tmp_path):
    first = save(tmp_path / "1", 1)
    for number in (2, 3):
        save_lora(tmp_path / str(number), seed=number, target_modules=["to_q", "to_v"], r=number)
    pipe = small_sdxl()
    pipe.load_nara_weights(first, "aware")
    pipe.enable_lora_hotswap(target_rank=4, check_compiled="ignore")
    pipe.load_lora_weights(tmp_path / "2", adapter_name="fixed")
    pipe.load_lora_weights(tmp_path / "3", adapter_name="fixed", hotswap=True)
    alone, both = small_sdxl(), small_sdxl()
    alone.load_lora_weights(tmp_path / "3", adapter_name="fixed")
    torch.testing.assert_close(predict(pipe), predict(alone), rtol=1e-4, atol=1e-5)
    pipe.set_adapters("aware")
    torch.testing.assert_close(predict(pipe), fresh(first), rtol=1e-4, atol=1e-5)
    both.load_nara_weights(first, "x")
    both.load_lora_weights(tmp_path / "2", adapter_name="up")
    before = State(both)
    with pytest.raises(ValueError, match=r"would put '.*lora_A.x.weight' of another adapter to zero, since 'up' is a"):
        both.load_lora_weights(tmp_path / "3", adapter_name="up", hotswap=True)
    assert before == State(both)


SHALLOW = {
    "block_out_channels": (8,),
    "down_block_types": ("CrossAttnDownBlock2D",),
    "up_block_types": ("CrossAttnUpBlock2D",),
    "transformer_layers_per_block": 1,
    "attention_head_dim": 4,
}


@pytest.mark.filterwarnings("ignore")  # of the compiler
def test_a_compiled_unet_is_not_compiled_again(tmp_path):
    torch._dynamo.reset()
    expected = []
    for seed, changes in ((1, {}), (2, {"lora_alpha": 5, "core_scale": 0.4})):
        options = {"target_modules": ["to_q", "conv1"], "r": 3, **changes}
        source = trained(small_sdxl(**SHALLOW), seed=seed, text=False, **options)
        source.save_nara_weights(tmp_path / str(seed))
        expected.append(predict(source))
    pipe = small_sdxl(**SHALLOW)
    pipe.enable_lora_hotswap(target_rank=3)
    pipe.load_nara_weights(tmp_path / "1", "x")
    graphs = []

    def count(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    pipe.unet.compile(backend=count)
    torch.testing.assert_close(predict(pipe), expected[0], rtol=1e-4, atol=1e-5)
    compiled = len(graphs)
    assert compiled
    pipe.load_nara_weights(tmp_path / "2", "x", hotswap=True)
    torch.testing.assert_close(predict(pipe), expected[1], rtol=1e-4, atol=1e-5)
    assert not torch.allclose(expected[0], expected[1], atol=1e-2)
    assert len(graphs) == compiled
    torch._dynamo.reset()
