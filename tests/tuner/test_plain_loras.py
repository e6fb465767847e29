"""Plain LoRAs beside NaRA: an identity adapter is one, and others are mixed in, or refused with a remedy."""

from __future__ import annotations

import pytest
import torch
from peft import (
    LoraConfig,
    get_peft_model,
    inject_adapter_in_model,
)
from peft.functional import delete_adapter, set_adapter
from torch import Tensor, nn

from nara_diffusion import noise_level
from nara_diffusion.noise.needs import is_noise_aware
from tests.helpers.adapted import TwoLayers, adapted, core_by_hand, disturb, lora_config, nara_config, relative_error
from tests.tuner.three_adapters import LEVELS, TARGETS, three_adapters


def test_an_identity_adapter_is_peft_s_lora_bit_by_bit():
    outputs, states = [], []
    for config in (lora_config(target_modules=TARGETS), nara_config(target_modules=TARGETS, core_type="identity")):
        torch.manual_seed(2)
        base = TwoLayers()
        x = torch.randn(3, 7)
        model = get_peft_model(base, config)
        disturb(model)
        outputs.append(model(x))
        states.append(model.state_dict())
    assert torch.equal(*outputs)
    assert states[0].keys() == states[1].keys()


def test_an_identity_adapter_needs_no_level_alone_and_one_beside_others():
    model = three_adapters()
    x = torch.randn(3, 7)
    model.set_adapter("plain")
    assert not is_noise_aware(model)
    expected = model(x)
    with noise_level(model, LEVELS):
        assert torch.equal(model(x), expected)
    model.base_model.set_adapter(["plain", "other"])
    with pytest.raises(ValueError, match="λ is not known"):
        model(x)


def test_lora_configs_are_refused_beside_nara_and_the_error_says_what_to_do():
    nara, lora = (
        adapted(TwoLayers(), target_modules=["first"]),
        get_peft_model(TwoLayers(), lora_config(target_modules=["first"])),
    )
    with pytest.raises(ValueError, match=r'Cannot combine adapters.*NaraConfig\(core_type="identity"\)'):
        nara.add_adapter("static", LoraConfig(target_modules=["first"]))
    with pytest.raises(ValueError, match=r'Cannot combine adapters.*NaraConfig\(core_type="identity"\)'):
        lora.add_adapter("nara", nara_config(target_modules=["first"]))


def test_a_mixed_model_is_refused_by_name():
    with pytest.raises(ValueError, match="NARA"):
        get_peft_model(TwoLayers(), nara_config(target_modules=["first"]), mixed=True)


@pytest.mark.filterwarnings("ignore:Already found a `peft_config` attribute")
@pytest.mark.parametrize("lora_first", [False, True])
def test_injected_nara_and_lora_adapters_mix(lora_first):
    model = TwoLayers()
    configs = {"nara": nara_config(target_modules=TARGETS), "lora": lora_config(target_modules=["second"], r=3)}
    for name in ("lora", "nara") if lora_first else ("nara", "lora"):
        inject_adapter_in_model(configs[name], model, name)
    disturb(model)
    x = torch.randn(3, 7)

    def expected(names: list[str]) -> Tensor:
        rows = []
        C = core_by_hand(model.state_dict(), "nara_core.cores.nara.shared.", configs["nara"], LEVELS)
        for i in range(3):
            h = x[i].double()
            for kind in TARGETS:
                layer = getattr(model, kind)
                W = layer.get_base_layer().weight.double()
                for name in names:
                    if name in layer.lora_A:
                        core = C[i] if name == "nara" else torch.eye(3, dtype=torch.float64)
                        A, B = layer.lora_A[name].weight.double(), layer.lora_B[name].weight.double()
                        W = W + 6 / len(core) * B @ core @ A
                h = h @ W.T + layer.get_base_layer().bias.double()
                h = torch.tanh(h) if kind == "first" else h
            rows.append(h)
        return torch.stack(rows)

    for names in (["nara"], ["lora"], ["lora", "nara"]):
        set_adapter(model, names)
        with noise_level(model, LEVELS):
            assert relative_error(model(x), expected(names)) < 5e-6
    set_adapter(model, "lora")
    assert not is_noise_aware(model)
    assert relative_error(model(x), expected(["lora"])) < 5e-6  # no λ needed
    del model.peft_config["nara"]
    delete_adapter(model, "nara", prefix="lora_")
    assert relative_error(model(x), expected_without_core(model, x)) < 5e-6
    assert not any("nara_core" in name for name in model.state_dict())


def expected_without_core(model: nn.Module, x: Tensor) -> Tensor:
    h = torch.tanh(x.double() @ model.first.get_base_layer().weight.double().T + model.first.get_base_layer().bias)
    second = model.second
    W = second.get_base_layer().weight.double()
    W = W + 6 / 3 * second.lora_B["lora"].weight.double() @ second.lora_A["lora"].weight.double()
    return h @ W.T + second.get_base_layer().bias


# ---------------------------------------------------------------- what a plain LoRA keeps


def test_a_plain_lora_may_target_parameters():
    model = adapted(TwoLayers(), target_modules=[], target_parameters=["first.weight"], core_type="identity")
    base = model.base_model.model
    layer = base.first
    A, B = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    weight = layer.get_base_layer().weight + 6 / 4 * (B @ A).view_as(layer.get_base_layer().weight)
    x = torch.randn(3, 7)
    hidden = torch.tanh(nn.functional.linear(x, weight, layer.get_base_layer().bias))
    torch.testing.assert_close(model(x), base.second(hidden), rtol=1e-5, atol=1e-5)


def test_a_plain_lora_may_replicate_layers(tiny_llama):
    model = adapted(tiny_llama, target_modules=["q_proj"], layer_replication=[(0, 2), (1, 2)], core_type="identity")
    assert len(model.base_model.model.model.layers) == 3
    assert model(torch.randint(49, (2, 5))).logits.shape == (2, 5, 50)


def test_a_plain_lora_may_adapt_attention_modules():
    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = nn.MultiheadAttention(8, 2, batch_first=True)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.attention(x, x, x)[0]

    model = adapted(Attention(), target_modules=["attention"], core_type="identity")
    x = torch.randn(2, 5, 8)
    expected = model(x)
    merged = model.merge_and_unload()
    assert type(merged.attention) is nn.MultiheadAttention
    torch.testing.assert_close(merged(x), expected, rtol=1e-5, atol=1e-5)
