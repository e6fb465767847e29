"""Several adapters on one model: together, in turn, sample by sample, switched off, deleted; plain LoRAs among them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model, inject_adapter_in_model
from peft.functional import delete_adapter, set_adapter
from peft.helpers import rescale_adapter_scale
from torch import Tensor, nn

from nara_diffusion import core_matrix, noise_level, set_noise_source
from nara_diffusion.noise import is_noise_aware
from tests.adapted import (
    OneLayer,
    TwoLayers,
    adapted,
    core_by_hand,
    default_core,
    disturb,
    lora_config,
    nara_config,
    relative_error,
)

LEVELS = torch.tensor([0.05, 0.5, 0.93])
TARGETS = ["first", "second"]


def three_adapters() -> PeftModel:
    """Of different rank, η, core and layers: "default" and "other" depend on λ, "plain" is a LoRA."""
    model = adapted(TwoLayers(), target_modules=TARGETS)
    model.add_adapter("other", nara_config(r=2, core_scale=0.3, target_modules=["first"], noise_embedding="mlp"))
    model.add_adapter("plain", nara_config(r=3, target_modules=["second"], core_type="identity"))
    disturb(model, seed=4)
    return model.eval()


def by_hand(model: PeftModel, x: Tensor, names: list[list[str]], levels: Tensor) -> Tensor:
    """The two layers in float64; `names` are the adapters of each sample."""
    rows = []
    for sample, adapters, level in zip(x.double(), names, levels, strict=True):
        h = sample
        for kind in TARGETS:
            layer = getattr(model.base_model.model, kind)
            W = layer.get_base_layer().weight.double()
            for name in adapters:
                if name in layer.lora_A:
                    config = model.peft_config[name]
                    C = torch.eye(config.r, dtype=torch.float64)
                    if config.core_type != "identity":
                        C = default_core(model, level[None], name)[0]
                    A, B = layer.lora_A[name].weight.double(), layer.lora_B[name].weight.double()
                    W = W + 6 / config.r * B @ C @ A
            h = h @ W.T + layer.get_base_layer().bias.double()
            if kind == "first":
                h = torch.tanh(h)
        rows.append(h)
    return torch.stack(rows)


# ---------------------------------------------------------------- together and in turn


@pytest.mark.parametrize(
    "names",
    [["default"], ["other"], ["plain"], ["default", "other"], ["plain", "other"], ["other", "plain", "default"]],
)
def test_active_adapters_add_up_to_the_sum_written_by_hand(names):
    model = three_adapters()
    model.base_model.set_adapter(names)
    x = torch.randn(3, 7)
    with noise_level(model, LEVELS):
        assert relative_error(model(x), by_hand(model, x, [names] * 3, LEVELS)) < 5e-6


def test_only_active_adapters_train_each_with_its_own_core():
    model = three_adapters()

    def trainable() -> set[str]:
        return {
            part
            for name, p in model.named_parameters()
            if p.requires_grad
            for part in (*name.split("."), "core" if "nara_core" in name else "")
            if part in (*model.peft_config, "core")
        }

    assert trainable() == {"default", "core"}
    model.set_adapter("other")
    assert trainable() == {"other", "core"}
    model.set_adapter("plain")
    assert trainable() == {"plain"}
    model.base_model.set_adapter(["default", "plain"])
    assert trainable() == {"default", "plain", "core"}
    model.set_adapter("default", inference_mode=True)
    assert trainable() == set()
    model.set_requires_grad(["other", "plain"])
    assert trainable() == {"other", "plain", "core"}
    model.set_requires_grad("other", requires_grad=False)
    assert trainable() == {"plain"}


def test_every_parameter_of_active_adapters_gets_a_gradient_and_no_other():
    model = three_adapters().train()
    model.base_model.set_adapter(["default", "other"])
    with noise_level(model, LEVELS):
        model(torch.randn(3, 7)).square().sum().backward()
    for name, p in model.named_parameters():
        active = ".default." in name or ".other." in name
        assert (p.grad is not None) == active, name
        assert not active or p.grad.abs().max() > 0, name


def test_adding_an_adapter_changes_neither_what_is_active_nor_what_trains():
    model = adapted(TwoLayers(), target_modules=TARGETS)
    model.set_requires_grad("default", requires_grad=False)
    holder = model.base_model.model.nara_core
    holder.cores["default"].requires_grad_(True)  # as a trainer may: the core alone
    before = {name: p.requires_grad for name, p in model.named_parameters()}
    x = torch.randn(3, 7)
    with noise_level(model, LEVELS):
        expected = model(x)
        model.add_adapter("other", nara_config(target_modules=TARGETS, core_init="kaiming"))
        assert torch.equal(model(x), expected)
    after = {name: p.requires_grad for name, p in model.named_parameters()}
    assert {name: after[name] for name in before} == before
    assert not any(value for name, value in after.items() if ".other." in name)
    assert model.active_adapters == ["default"]


def test_each_adapter_keeps_its_own_frequencies():
    model = adapted(TwoLayers(), target_modules=["first"])
    model.add_adapter("other", nara_config(target_modules=["first"]))
    state = model.state_dict()
    a, b = (
        state[f"base_model.model.nara_core.cores.{name}.global.embeddings.noise_level.frequencies"]
        for name in ("default", "other")
    )
    assert not torch.equal(a, b)


def test_a_name_that_is_taken_is_refused():
    model = adapted(TwoLayers(), target_modules=["first"])
    with pytest.raises(ValueError, match="'default' already exists"):
        model.add_adapter("default", nara_config(target_modules=["first"]))


FAILING = [
    ({"target_modules": ["nothing"]}, "nothing|No modules were targeted"),
    (
        {"target_modules": ["first", "embed"], "use_dora": True},
        r"cannot adapt 'embed' \(Embedding\)|ModulesToSaveWrapper",
    ),
    ({"target_modules": ["first", "tanh"]}, "Target module Tanh"),
    ({"target_modules": ["first"], "r": 0}, "`r` should be a positive integer"),
    ({"target_modules": ["first", "second"], "init_lora_weights": "orthogonal", "r": 3}, "rank to be even"),
    ({"target_modules": ["first"], "noise_convention": "sigma"}, "trained with λ defined as 'sigma'"),
]

FAILING_CASES = [
    pytest.param(*case, first, id=f"{case[1]}-{'first' if first else 'second'}")
    for case in FAILING
    for first in (True, False)
    if not (first and "noise_convention" in case[0])  # there is no source of λ before there is an adapter
]


@pytest.mark.parametrize(("options", "message", "first_adapter"), FAILING_CASES)
def test_a_failing_injection_leaves_the_model_as_it_was(options, message, first_adapter):
    base = TwoLayers()
    base.embed, base.tanh = nn.Embedding(3, 7), nn.Tanh()
    model: Any = base if first_adapter else adapted(base, target_modules=["second"], modules_to_save=["embed"])
    if not first_adapter:

        def source(*_: Any) -> Any:
            raise AssertionError("not asked")

        source.convention = "masked_share"  # type: ignore[attr-defined]
        set_noise_source(model, source)  # type: ignore[arg-type]
    modules = {name: id(module) for name, module in model.named_modules()}
    trainable = {name: p.requires_grad for name, p in model.named_parameters()}
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    config = nara_config(**{"modules_to_save": ["embed"], **options} if "embed" not in str(options) else options)
    with pytest.raises(ValueError, match=message):
        get_peft_model(base, config) if first_adapter else model.add_adapter("other", config)
    assert {name: id(module) for name, module in model.named_modules()} == modules
    assert {name: p.requires_grad for name, p in model.named_parameters()} == trainable
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in state.items())
    if first_adapter:
        assert not base._forward_pre_hooks
        assert not base._forward_hooks
        assert not hasattr(base, "nara_core")
    else:
        assert set(model.peft_config) == {"default"}
        assert model.base_model.model.second.active_adapters == ["default"]
        model.add_adapter("other", nara_config(target_modules=TARGETS))


def test_modules_to_save_named_like_a_part_of_a_core_are_those_of_the_base_model():
    base = TwoLayers()
    base.embeddings, base.projection = nn.Linear(3, 3), nn.Linear(2, 2)
    model = adapted(base, target_modules=["first"], noise_embedding="mlp")
    model.add_adapter("other", nara_config(target_modules=["second"], modules_to_save=["embeddings", "projection"]))
    wrapped = {name for name, module in model.named_modules() if type(module).__name__ == "ModulesToSaveWrapper"}
    assert wrapped == {"base_model.model.embeddings", "base_model.model.projection"}


@pytest.mark.parametrize("init", ["pissa", "olora", "orthogonal"])
def test_a_failing_injection_puts_back_what_its_initialisation_took_out_of_the_base_weights(init):
    base = TwoLayers()
    base.embed = nn.Embedding(3, 7)
    before = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    config = nara_config(target_modules=["first", "second", "embed"], init_lora_weights=init, use_dora=True)
    with pytest.raises(ValueError, match=r"cannot adapt 'embed'|Unknown initialization"):
        get_peft_model(base, config)
    assert base.state_dict().keys() == before.keys()
    for name, tensor in before.items():
        torch.testing.assert_close(base.state_dict()[name], tensor, rtol=1e-5, atol=1e-6)


# ---------------------------------------------------------------- off, deleted, unloaded


def test_disabled_it_is_the_base_model_and_needs_no_level():
    base = TwoLayers()
    x = torch.randn(3, 7)
    expected = base(x)
    model = adapted(base, target_modules=TARGETS)
    with model.disable_adapter():
        assert not is_noise_aware(model)
        assert torch.equal(model(x), expected)
        assert model.get_model_status().enabled is False
        with noise_level(model, LEVELS):
            assert torch.equal(model(x), expected)
    assert is_noise_aware(model)
    assert model.get_model_status().enabled is True
    model.base_model.disable_adapter_layers()
    assert torch.equal(model(x), expected)
    model.base_model.enable_adapter_layers()
    with noise_level(model, LEVELS):
        assert not torch.equal(model(x), expected)
    with pytest.raises(ValueError, match="λ is not known"):
        model(x)


@pytest.mark.filterwarnings("ignore:Adapter default was active which is now deleted")
def test_a_deleted_adapter_leaves_nothing_behind():
    model = three_adapters()
    model.delete_adapter("default")
    assert not any(".default." in name for name in model.state_dict())
    holder = model.base_model.model.nara_core
    assert set(holder.cores) == set(holder.r) == {"other", "plain"}
    assert not any("default" in layer.lora_variant for layer in model.modules() if hasattr(layer, "lora_variant"))
    x = torch.randn(3, 7)
    model.set_adapter("other")
    with noise_level(model, LEVELS):
        assert relative_error(model(x), by_hand(model, x, [["other"]] * 3, LEVELS)) < 5e-6
    model.add_adapter("default", nara_config(target_modules=["second"]))  # the name is free again
    model.set_adapter("default")
    assert model.get_model_status().active_adapters == ["default"]


def test_one_of_two_active_adapters_may_be_deleted():
    model = three_adapters()
    model.base_model.set_adapter(["default", "other"])
    model.delete_adapter("default")
    assert model.active_adapters == ["other"]
    x = torch.randn(3, 7)
    with noise_level(model, LEVELS):
        assert relative_error(model(x), by_hand(model, x, [["other"]] * 3, LEVELS)) < 5e-6


def test_the_last_adapter_may_be_deleted_and_another_one_added():
    base = TwoLayers()
    x = torch.randn(3, 7)
    expected = base(x)
    model = adapted(base, target_modules=TARGETS)
    model.base_model.delete_adapter("default")
    assert torch.equal(model.base_model(x), expected)
    assert not is_noise_aware(model)
    assert not [name for name in model.state_dict() if "lora_" in name or "nara_core" in name]
    model.add_adapter("new", nara_config(target_modules=["first"]))
    model.set_adapter("new")
    disturb(model)
    with noise_level(model, LEVELS):
        assert relative_error(model(x), by_hand(model, x, [["new"]] * 3, LEVELS)) < 5e-6


def test_unloading_gives_the_base_model_back():
    base = TwoLayers()
    x = torch.randn(3, 7)
    expected, modules = base(x), {name: type(module) for name, module in base.named_modules()}
    model = adapted(base, target_modules=TARGETS)
    with noise_level(model, LEVELS):
        model(x)
        plain = model.unload()
        assert torch.equal(plain(x), expected)
    assert plain is base
    assert {name: type(module) for name, module in plain.named_modules()} == modules
    assert not base._forward_pre_hooks
    assert not base._forward_hooks
    assert not hasattr(base, "peft_config")
    again = adapted(plain, target_modules=TARGETS)  # and it may be adapted once more
    with noise_level(again, LEVELS):
        assert not torch.equal(again(x), expected)


# ---------------------------------------------------------------- plain LoRAs


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
        C = core_by_hand(model.state_dict(), "nara_core.cores.nara.global.", configs["nara"], LEVELS)
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


# ---------------------------------------------------------------- one adapter a sample


def test_each_sample_of_a_mixed_batch_gets_its_adapter_at_its_own_level():
    model = three_adapters()
    names = ["other", "__base__", "default", "plain", "default", "other"]
    levels = torch.tensor([0.1, 0.2, 0.3, 0.5, 0.7, 0.9])
    x = torch.randn(6, 7)
    expected = by_hand(model, x, [[] if name == "__base__" else [name] for name in names], levels)
    with noise_level(model, levels):
        assert relative_error(model(x, adapter_names=names), expected) < 5e-6
    with noise_level(model, 0.4):
        shared = by_hand(model, x, [[] if n == "__base__" else [n] for n in names], torch.full((6,), 0.4))
        assert relative_error(model(x, adapter_names=names), shared) < 5e-6


def test_a_mixed_batch_needs_a_level_only_if_one_of_its_adapters_does():
    model = three_adapters()
    x = torch.randn(2, 7)
    expected = by_hand(model, x, [["plain"], []], torch.zeros(2))
    assert relative_error(model(x, adapter_names=["plain", "__base__"]), expected) < 5e-6
    with pytest.raises(ValueError, match=r"λ is not known, but adapter.* 'other' depend"):
        model(x, adapter_names=["plain", "other"])
    with noise_level(model, LEVELS), pytest.raises(ValueError, match="3 values, but adapter_names has 2"):
        model(x, adapter_names=["default", "other"])
    with pytest.raises(ValueError, match=r"non-existing adapter.*nobody"):
        model(x, adapter_names=["default", "nobody"])
    model.set_adapter("plain")
    assert model(x).shape == (2, 5)  # a refused batch leaves nothing behind


def test_mixed_batches_of_convolutions_and_tokens():
    model = adapted(OneLayer(nn.Conv2d(7, 5, 3)), target_modules=["layer"])
    model.add_adapter("other", nara_config(target_modules=["layer"], r=2))
    disturb(model, seed=4)
    x = torch.randn(3, 7, 6, 5)
    with noise_level(model, LEVELS):
        mixed = model(x, adapter_names=["other", "default", "other"])
    for i, name in enumerate(["other", "default", "other"]):
        model.set_adapter(name)
        with noise_level(model, float(LEVELS[i])):
            torch.testing.assert_close(mixed[i : i + 1], model(x[i : i + 1]), rtol=1e-5, atol=1e-5)


def test_mixed_batches_with_dora_or_embeddings_are_refused():
    dora = adapted(TwoLayers(), target_modules=TARGETS, use_dora=True)
    with noise_level(dora, LEVELS), pytest.raises(ValueError, match="Cannot pass `adapter_names` when DoRA is enabled"):
        dora(torch.randn(3, 7), adapter_names=["default"] * 3)
    embedding = adapted(OneLayer(nn.Embedding(13, 5)), target_modules=["layer"])
    ids = torch.randint(13, (3, 4))
    with noise_level(embedding, LEVELS), pytest.raises(ValueError, match="embedding 'layer' is adapted with NaRA"):
        embedding(ids, adapter_names=["default"] * 3)
    with noise_level(embedding, LEVELS):
        assert embedding(ids).shape == (3, 4, 5)  # the refusals leave no hook behind


@pytest.mark.parametrize("num_beams", [1, 3])
def test_generation_with_one_adapter_a_sample_and_beams(tiny_llama, num_beams):
    tiny_llama.config.is_causal = True
    model = adapted(tiny_llama, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    model.add_adapter("other", nara_config(target_modules=["o_proj"]))
    disturb(model, seed=5)
    ids = torch.randint(1, 49, (3, 4))
    names = ["default", "other", "__base__"]
    options = {"max_new_tokens": 4, "num_beams": num_beams, "do_sample": False, "eos_token_id": None}
    levels = torch.tensor([0.2, 0.5, 0.8])
    with noise_level(model, levels.repeat_interleave(num_beams)):
        mixed = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), adapter_names=names, **options)
    for i, name in enumerate(names):
        single = {"input_ids": ids[i : i + 1], "attention_mask": torch.ones(1, 4, dtype=torch.long), **options}
        if name == "__base__":
            with model.disable_adapter():
                alone = model.generate(**single)
        else:
            model.set_adapter(name)
            with noise_level(model, float(levels[i])):
                alone = model.generate(**single)
        assert torch.equal(mixed[i : i + 1], alone)


def test_generation_reads_the_level_of_the_context(tiny_llama):
    model = adapted(tiny_llama, target_modules=["q_proj", "v_proj", "down_proj"], task_type="CAUSAL_LM")
    ids = torch.randint(1, 49, (2, 4))
    options = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 8, "do_sample": False, "eos_token_id": None}
    with noise_level(model, torch.tensor([0.1, 0.9])):
        both = model.generate(input_ids=ids, **options)
    options["attention_mask"] = options["attention_mask"][:1]
    for i, level in enumerate((0.1, 0.9)):
        with noise_level(model, level):
            assert torch.equal(model.generate(input_ids=ids[i : i + 1], **options), both[i : i + 1])
    with pytest.raises(ValueError, match="λ is not known"):
        model.generate(input_ids=ids[:1], **options)


# ---------------------------------------------------------------- scales and status


def test_scales_multiply_the_update_and_not_the_deviation_of_the_core():
    model = adapted(TwoLayers(), target_modules=["second"])
    x = torch.randn(3, 7)
    with noise_level(model, LEVELS):
        full = model(x)
        with model.disable_adapter():
            base = model(x)
        with rescale_adapter_scale(model, 0.5):
            torch.testing.assert_close(model(x), (full + base) / 2, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(model(x), full)
        layers = [m for m in model.modules() if hasattr(m, "set_scale")]
        for layer in layers:
            layer.set_scale("default", 0.25)
        torch.testing.assert_close(model(x), base + (full - base) / 4, rtol=1e-5, atol=1e-5)
        for layer in layers:
            layer.scale_layer(2)
        torch.testing.assert_close(model(x), (full + base) / 2, rtol=1e-5, atol=1e-5)
        for layer in layers:
            layer.unscale_layer()
        torch.testing.assert_close(model(x), full, rtol=1e-5, atol=1e-5)


def test_status_and_counts_tell_of_every_adapter():
    model = three_adapters()
    status = model.get_model_status()
    assert status.enabled is True
    assert status.active_adapters == ["default"]
    assert status.available_adapters == ["default", "other", "plain"]
    assert status.merged_adapters == []
    assert status.requires_grad == {"default": True, "other": False, "plain": False}
    assert status.devices == {"default": ["cpu"], "other": ["cpu"], "plain": ["cpu"]}
    assert status.num_adapter_layers == 3  # two layers and the holder of the cores
    trainable = [p.numel() for n, p in model.named_parameters() if ".default." in n]
    assert model.get_nb_trainable_parameters() == (sum(trainable), sum(p.numel() for p in model.parameters()))
    names = [layer.name for layer in model.get_layer_status()]
    assert names == ["model.first", "model.second", "model.nara_core"]
    model.merge_adapter(noise_level=0.3)
    assert model.get_model_status().merged_adapters == ["default"]


# ---------------------------------------------------------------- adapted models inside a module


class Pair(nn.Module):
    """Two adapted models under one roof, as a pipeline's parts may be."""

    def __init__(self) -> None:
        super().__init__()
        self.left = adapted(TwoLayers(), target_modules=["first"])
        self.right = get_peft_model(TwoLayers(), nara_config(target_modules=["second"], r=2), adapter_name="other")
        disturb(self.right, seed=6)

    def forward(self, x: Tensor) -> Tensor:
        return self.left(x) + self.right(x)


def test_one_level_serves_every_adapted_model_below():
    pair = Pair()
    x = torch.randn(3, 7)
    with noise_level(pair, LEVELS):
        both = pair(x)
    with noise_level(pair.left, LEVELS), noise_level(pair.right, LEVELS):
        assert torch.equal(pair(x), both)
    with noise_level(pair.left, LEVELS), pytest.raises(ValueError, match="λ is not known"):
        pair(x)
    assert core_matrix(pair, 0.3, "other").shape == (1, 2, 2)
    with pytest.raises(ValueError, match="no adapter 'nobody': the model has 'default', 'other'"):
        core_matrix(pair, 0.3, "nobody")


def test_two_adapters_of_one_name_need_the_model_that_is_meant():
    pair = Pair()
    pair.right = adapted(TwoLayers(), target_modules=["first"])
    with pytest.raises(ValueError, match="2 models below Pair have an adapter 'default': pass the one that is meant"):
        core_matrix(pair, 0.3)
