"""NaraConfig: choices, numbers and LoRA's options that are refused by name, starts that are PEFT's, and its files."""

from __future__ import annotations

import dataclasses
import json
from enum import Enum
from itertools import cycle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, LoraRuntimeConfig, PeftConfig, PeftModel, TaskType, get_peft_model
from peft.tuners.lora.config import ArrowConfig, BdLoraConfig, EvaConfig, KasaConfig, MontecloraConfig, VeloraConfig

from nara_diffusion import NaraConfig, StrengthSchedule, noise_level
from nara_diffusion.loaders.adapter_part import config_from_fields, config_to_fields
from tests.helpers.adapted import TwoLayers, nara_config

CONFIG = "adapter_config.json"
REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"core_type": "hyper"}, "core_type is 'hyper': choose one of 'hypernetwork', 'constant', 'identity'"),
    ({"core_init": "zeros"}, "core_init is 'zeros': choose one of 'zero_last', 'kaiming', 'zero_all'"),
    ({"core_sharing": "model"}, "core_sharing is 'model': choose one of 'global', 'module_type', 'layer'"),
    ({"few_steps": {"guidance_scale": 1.0}}, "few_steps is .* num_inference_steps"),
    ({"few_steps": 4}, "few_steps is 4"),
    ({"core_hidden_dims": ()}, "core_hidden_dims is"),
    ({"core_hidden_dims": (256.0,)}, "core_hidden_dims is"),
    ({"core_hidden_dims": 256}, "core_hidden_dims is 256: pass one positive integer for each hidden layer"),
    ({"noise_embedding_dim": 63}, "noise_embedding_dim is 63, .* even number"),
    ({"core_scale": 0}, "core_scale is 0: pass a finite number greater than 0"),
    ({"core_scale": "0.1"}, "core_scale is '0.1'"),
    ({"fourier_scale": float("nan")}, "fourier_scale is nan"),
    ({"core_type": "knots", "core_knots": 1}, "core_knots is 1, .*pass 2 or more"),
    ({"core_type": "bins", "r": 8}, "core_bins is 5, with .*r=8: pass a divisor of r"),
    ({"core_type": "bins", "r": 10, "rank_pattern": {"a": 4}}, "core_bins is 5, with .* a divisor of r and of the"),
    ({"core_type": "rank_mask", "r": 4, "rank_mask_step": 3}, "rank_mask_step is 3, .*pass a divisor of r"),
    (
        {"core_type": "rank_mask", "r": 4, "rank_mask_min": 1, "rank_mask_step": 2},
        "rank_mask_step is 2, .*a divisor",
    ),
    ({"rank_mask_exponent": 0.0}, "rank_mask_exponent is 0.0: pass a finite number greater than 0"),
    ({"core_type": "rank_mask", "r": 4, "rank_mask_min": 5}, "rank_mask_min is 5, with .*r=4"),
    ({"rank_mask_min": 2}, "rank_mask_min is 2, with core_type='hypernetwork' .* for core_type='rank_mask'"),
    ({"core_input": "both"}, "core_input is 'both': choose one of 'noise_level'"),
    ({"mask_density_radius": 8}, "mask_density_radius is 8: choose one of 4"),
    ({"core_type": "constant", "noise_embedding": "raw"}, "noise_embedding is 'raw', which core_type 'constant' does"),
    ({"strength": [[0.5, 1], [0.2, 1]]}, "strength is .*ascending"),
    ({"strength": [[0, 1]], "bias": "all"}, "strength depends on λ, but can't scale what bias='all'"),
    ({"strength": [[0, 1]], "init_lora_weights": "pissa"}, "strength depends on λ, but can't scale what init_lora"),
    ({"init_lora_weights": "corda"}, "init_lora_weights is 'corda', .*pass True, False"),
    ({"init_lora_weights": "pissa_niter_x"}, "init_lora_weights is 'pissa_niter_x'"),
    ({"init_lora_weights": "olora", "core_init": "kaiming"}, "init_lora_weights is 'olora', .*needs C = I at step 0"),
    ({"init_lora_weights": "pissa", "core_type": "rank_mask"}, "init_lora_weights is 'pissa', .*needs C = I at step 0"),
    ({"lora_a_init": "orthogonal", "init_lora_weights": "gaussian"}, "lora_a_init is 'orthogonal', with"),
    ({"core_normalization": "frobenius"}, "NaraConfig has no field 'core_normalization'"),
    ({"r": "3"}, "r is '3': pass a positive integer"),
    ({"rank_pattern": {"a": 2.0}}, "rank_pattern is .*positive integer rank"),
    ({"lora_alpha": float("nan")}, "lora_alpha is nan: pass a finite number"),
    ({"lora_alpha": "8"}, "lora_alpha is '8': pass a finite number"),
    ({"lora_dropout": 1.5}, "lora_dropout is 1.5: pass a number from 0 to less than 1"),
    ({"lora_dropout": True}, "lora_dropout is True: pass a number"),
    ({"bias": "some"}, "bias is 'some': choose one of 'none', 'all', 'lora_only'"),
    ({"use_dora": "no"}, "use_dora is 'no': pass True or False"),
    ({"use_rslora": "false"}, "use_rslora is 'false': pass True or False"),
    ({"modules_to_save": "head"}, "modules_to_save is 'head': pass a list"),
    ({"init_lora_weights": 1}, "init_lora_weights is 1, .*pass True, False"),
    ({"noise_convention": 0}, "noise_convention is 0: pass a string or None"),
    ({"noise_convention": False}, "noise_convention is False: pass a string"),
    ({"noise_convention": ["flow"]}, r"noise_convention is \['flow'\]: pass a string"),
    ({"strength": 0.5}, "strength is 0.5, not a StrengthSchedule or its points"),
    ({"alpha_pattern": {"a": float("inf")}}, "alpha_pattern is {'a': inf}: .*finite alpha"),
]


class Start(str, Enum):
    """As PEFT's own enumerations of strings."""

    GAUSSIAN = "gaussian"


ACCEPTED: list[dict[str, Any]] = [
    {"lora_alpha": 6.5, "lora_dropout": 0},
    {"r": np.int64(3), "lora_alpha": np.float32(2), "layers_to_transform": np.int64(1), "target_modules": {"q"}},
    {"target_modules": ("q", "v"), "exclude_modules": {"k"}, "modules_to_save": ("head",)},
    {"target_modules": r".*\.q", "exclude_modules": r".*\.k"},
    {"layers_to_transform": range(3), "layers_pattern": "blocks", "target_modules": ["q"]},
    {"init_lora_weights": Start.GAUSSIAN, "task_type": TaskType.CAUSAL_LM},
    {"rank_pattern": None, "alpha_pattern": None, "use_rslora": None, "modules_to_save": None},
    {"trainable_token_indices": {"embed": [1, 2]}, "base_model_name_or_path": Path("base"), "revision": "main"},
    {"trainable_token_indices": [1, 2], "runtime_config": LoraRuntimeConfig(), "loftq_config": {}},
    {"core_hidden_dims": [3], "strength": ((0, 1), (1, 0)), "few_steps": {"num_inference_steps": 4}},
]
"""What PEFT's and our users pass beside the annotated types."""
INITS = [True, False, "gaussian", "pissa", "pissa_niter_4", "olora", "orthogonal"]
OPTIONS: dict[str, Any] = {
    "target_parameters": ["layer.weight"],
    "layer_replication": [(0, 1)],
    "megatron_config": {"a": 1},
    "alora_invocation_tokens": [1, 2],
    "arrow_config": ArrowConfig(),
    "use_bdlora": BdLoraConfig(),
    "use_qalora": True,
    "velora_config": VeloraConfig(),
    "monteclora_config": MontecloraConfig(),
    "kasa_config": KasaConfig(),
    "ensure_weight_tying": True,
}
KEPT = {
    "task_type", "peft_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision", "inference_mode",
    "r", "target_modules", "exclude_modules", "lora_alpha", "lora_dropout", "fan_in_fan_out", "bias", "use_rslora",
    "modules_to_save", "init_lora_weights", "layers_to_transform", "layers_pattern", "rank_pattern", "alpha_pattern",
    "trainable_token_indices", "use_dora", "runtime_config", "lora_bias",
    # which only qualify an option that is refused
    "megatron_core", "loftq_config", "eva_config", "corda_config", "lora_ga_config", "qalora_group_size",
}  # fmt: skip


@pytest.mark.filterwarnings("ignore:`init_lora_weights` is:UserWarning")
def test_impossible_config_is_refused_naming_its_field() -> None:
    for fields, message in REFUSED:
        with pytest.raises(ValueError, match=f"^{message}"):
            NaraConfig(**fields)


@pytest.mark.parametrize("fields", ACCEPTED, ids=str)
def test_config_accepts_what_users_of_peft_pass(fields: dict[str, Any]) -> None:
    config = NaraConfig(**fields)
    assert config.peft_type == "NARA"
    assert dataclasses.replace(config) == config


def test_config_has_considered_every_option_of_peft() -> None:
    options = {field.name for field in dataclasses.fields(LoraConfig)}
    assert options - KEPT - OPTIONS.keys() == set(), "new in PEFT: refuse it in config.py, or test it"


@pytest.mark.filterwarnings("ignore:aLoRA is currently only supported", "ignore:`init_lora_weights` is:UserWarning")
def test_option_without_core_is_refused_except_plain_lora() -> None:
    for option, value in OPTIONS.items():
        with pytest.raises(ValueError, match=f"NaRA does not support {option}, .*core_type='identity'"):
            NaraConfig(**{option: value})
        assert getattr(NaraConfig(core_type="identity", **{option: value}), option)
    for strength in (None, [[0, 1]]):
        NaraConfig(core_type="identity", init_lora_weights="eva", eva_config=EvaConfig(), strength=strength)


@pytest.mark.parametrize(("init", "use_dora"), list(zip(INITS, cycle([False, True]), strict=False)))
def test_supported_initialisation_matches_peft_and_starts_as_base(init: Any, use_dora: bool) -> None:
    states, x = [], torch.randn(3, 4, 7)
    for kind in (LoraConfig, NaraConfig):
        torch.manual_seed(5)
        base = TwoLayers()
        expected = base(x).detach()
        config = kind(r=4, lora_alpha=6, target_modules=["first", "second"], init_lora_weights=init, use_dora=use_dora)
        model = get_peft_model(base, config)
        states.append({name: tensor for name, tensor in model.state_dict().items() if "core" not in name})
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(tensor, states[1][name]) for name, tensor in states[0].items())
    if init is not False:  # which draws B too
        with noise_level(model, torch.tensor([0.1, 0.5, 0.9])):
            torch.testing.assert_close(model(x), expected, rtol=1e-5, atol=2e-6)


def test_config_defaults_are_those_of_the_paper() -> None:
    config = NaraConfig()
    assert (config.core_scale, config.core_hidden_dims, config.noise_embedding_dim) == (0.1, (256, 512), 64)
    assert (config.fourier_scale, config.core_init, config.core_type) == (16.0, "zero_last", "hypernetwork")
    config.rank_pattern["a"] = 3
    assert NaraConfig().rank_pattern == {}


# ---------------------------------------------------------------------- files


def test_config_survives_pefts_file_with_types(tmp_path: Path) -> None:
    config = NaraConfig(
        r=6,
        lora_alpha=9,
        target_modules=["q_proj", "v_proj"],
        core_scale=0.25,
        core_hidden_dims=[31, 7],
        core_sharing="module_type",
        noise_embedding="mlp",
        noise_convention="masked_share",
        rank_pattern={"q_proj": 4},
        use_dora=True,
        strength=StrengthSchedule([(0, 1), (0.7, 0.3)]),
    )
    config.save_pretrained(tmp_path)
    fields = json.loads((tmp_path / CONFIG).read_text())
    assert fields["peft_type"] == "NARA"
    later = {"later_config": None, "use_later": False}  # fields of a later PEFT that are not set
    (tmp_path / CONFIG).write_text(json.dumps(fields | later))
    for cls in (PeftConfig, NaraConfig, LoraConfig):
        with pytest.warns(UserWarning, match="Unexpected keyword arguments"):  # of PEFT
            loaded = cls.from_pretrained(tmp_path)
        assert type(loaded) is NaraConfig
        assert loaded == config
        assert loaded.core_hidden_dims == (31, 7)
    read_back = json.loads(json.dumps(config_to_fields(config)))
    assert "peft_version" not in read_back
    for saved_fields in (read_back, config.to_dict() | later):
        assert config_to_fields(config_from_fields(saved_fields, "the file")) == config_to_fields(config)


@pytest.mark.filterwarnings("ignore:Unexpected keyword arguments")  # of PEFT
def test_early_fields_are_dropped_and_others_required(tmp_path: Path) -> None:
    config, early = nara_config(target_modules=["first"]), {"core_normalization": "none", "noise_scale": "linear"}
    config.save_pretrained(tmp_path)
    fields = json.loads((tmp_path / CONFIG).read_text()) | early | {"layer_embedding_dim": 16}
    (tmp_path / CONFIG).write_text(json.dumps(fields))
    assert config_to_fields(NaraConfig.from_pretrained(str(tmp_path))) == config_to_fields(config)
    assert config_to_fields(config_from_fields(fields, "the file")) == config_to_fields(config)
    with pytest.raises(ValueError, match="the file has no field 'lora_alpha'"):
        config_from_fields({name: value for name, value in fields.items() if name != "lora_alpha"}, "the file")
    with pytest.raises(ValueError, match="no field 'noise_scale'"):
        config_from_fields(fields | {"noise_scale": "log_snr"}, "the file")


@pytest.mark.parametrize(
    "changes", [{"core_flavour": "vanilla"}, {"core_type": "diagonal"}, {"core_scale": -1}], ids=str
)
def test_unknown_field_or_value_is_refused_by_name(changes: Any, tmp_path: Path) -> None:
    nara_config(target_modules=["first"]).save_pretrained(tmp_path)
    path, name = tmp_path / CONFIG, next(iter(changes))
    (tmp_path / "adapter_model.safetensors").touch()
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    for read in (
        lambda: PeftModel.from_pretrained(TwoLayers(), tmp_path),
        lambda: config_from_fields(json.loads(path.read_text()), f"'{path}'"),
    ):
        with pytest.raises(ValueError, match=name) as caught:
            read()
        assert str(tmp_path) in str(caught.value)
    for kind in (NaraConfig, PeftConfig):
        with pytest.raises(ValueError, match=name):
            kind.from_pretrained(str(tmp_path))
