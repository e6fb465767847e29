"""adapter_config.json comes back as it was; with wrong settings a ValueError names the file and the field."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftConfig, PeftModel
from torch import nn

from nara_diffusion import NaraConfig
from nara_diffusion.tuner.config_files import config_from_fields, config_to_fields
from tests.helpers.adapted import adapted
from tests.helpers.files.saved_adapters import TARGETS, base_model, output, reseeded_base, saved
from tests.helpers.files.wrong_settings import ALWAYS_THERE, LATER, MAY_BE, WRONG

CONFIG = "adapter_config.json"
UNTOUCHED = base_model(), adapted(base_model(), target_modules=TARGETS)
"""Refused files all meet the same two models, which have to stay as they are."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("adapter")
    saved(path)
    return path


def altered(folder: Path, tmp_path: Path, **changes: Any) -> Path:
    """A copy of the adapter with other settings."""
    return written(folder, tmp_path, json.dumps(json.loads((folder / CONFIG).read_text()) | changes))


def written(folder: Path, tmp_path: Path, content: str | bytes) -> Path:
    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / CONFIG).write_bytes(content.encode() if isinstance(content, str) else content)
    return tmp_path


def refused_everywhere(folder: Path, *parts: str) -> None:
    """By each of PEFT's ways to read a folder: with the file's name and these parts, and no change of the model."""
    base, model = UNTOUCHED
    before = [_state(base), _state(model)]
    for read in (
        lambda: PeftModel.from_pretrained(base, folder),
        lambda: model.load_adapter(str(folder), "other"),
        lambda: PeftConfig.from_pretrained(str(folder)),
        lambda: NaraConfig.from_pretrained(str(folder)),
    ):
        with pytest.raises(ValueError, match=re.escape(str(folder / CONFIG))) as caught:
            read()
        for part in parts:
            assert part in str(caught.value)
    assert [_state(base), _state(model)] == before
    assert list(model.peft_config) == ["default"]


def _state(model: nn.Module) -> dict[str, tuple[int, int]]:
    tensors = model.state_dict(keep_vars=True)
    return {name: (id(tensor), tensor._version) for name, tensor in tensors.items()}


# ---------------------------------------------------------------- fields


def test_every_field_of_the_configuration_is_fuzzed():
    fields = {field.name for field in dataclasses.fields(NaraConfig)}
    assert fields - MAY_BE.keys() == {"runtime_config"}, "PEFT drops it out of every file"


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("field", MAY_BE)
def test_a_wrong_value_of_any_field_is_refused_with_the_file_and_the_field(field, folder, tmp_path):
    for kind, value in WRONG.items():
        if kind not in MAY_BE[field]:
            refused_everywhere(altered(folder, tmp_path, **{field: value}), field)
        else:
            assert PeftConfig.from_pretrained(str(altered(folder, tmp_path, **{field: value}))).peft_type == "NARA"


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        ({"r": 10**12}, ("r is 1000000000000", "of at most 65536")),
        ({"core_hidden_dims": [4, 2**40]}, ("core_hidden_dims is [4, 1099511627776]",)),
        ({"r": 2**14, "core_hidden_dims": [2**16]}, ("core_hidden_dims (65536,)", "17592186044416 entries")),
        ({"core_type": "knots", "r": 2**14, "core_knots": 2**14}, ("core_knots 16384", "4398046511104 entries")),
        ({"rank_pattern": {"fir(st": 3}}, ("rank_pattern is {'fir(st': 3}", "valid regular expressions")),
        ({"rank_pattern": ["first"]}, ("rank_pattern is ['first']",)),
        ({"alpha_pattern": {"first": float("nan")}}, ("alpha_pattern is {'first': nan}",)),
        ({"target_modules": "fir(st"}, ("target_modules is 'fir(st'", "valid regular expression")),
        ({"exclude_modules": "*"}, ("exclude_modules is '*'",)),
        ({"exclude_modules": "a{99999999999999}"}, ("exclude_modules is",)),
        ({"peft_type": "LORA"}, ("fields of a NaRA", "peft_type is 'LORA'")),
        ({"peft_type": None}, ("peft_type is None",)),
        ({"core_type": "mine"}, ("core_type is 'mine'", "register_core")),
        ({"core_type": "identity", "init_lora_weights": "loftq"}, ("loftq",)),
        ({"core_type": "identity", "eva_config": 3}, ("eva_config is 3",)),
        ({"core_scale": 1e308}, ("core_scale is 1e+308", "1e+09")),
        ({"core_scale": 1e-40}, ("core_scale is 1e-40", "from 1e-09")),
        ({"fourier_scale": 10**30}, ("fourier_scale is 1000000000",)),
        ({"lora_alpha": -1e308}, ("lora_alpha is -1e+308", "1e+09")),
        ({"alpha_pattern": {"first": 1e39}}, ("alpha_pattern is {'first': 1e+39}",)),
        ({"strength": [[0, 1e39]]}, ("strength is [[0, 1e+39]]",)),
        ({"strength": [[0, 10**400]]}, ("strength is [[0, 1000",)),
        ({"modules_to_save": "enc\0"}, ("modules_to_save is 'enc\\x00'", "a list of names")),
    ],
    ids=str,
)
def test_a_setting_that_no_adapter_can_have_is_refused_by_name(changes, parts, folder, tmp_path):
    refused_everywhere(altered(folder, tmp_path, **changes), *parts)


@pytest.mark.parametrize("field", ALWAYS_THERE)
def test_file_without_a_field_that_every_version_writes_is_refused_by_name(field, folder, tmp_path):
    fields = json.loads((folder / CONFIG).read_text())
    del fields[field]
    refused_everywhere(written(folder, tmp_path, json.dumps(fields)), f"lacks {field}", "damaged")


def test_file_of_an_older_version_without_later_fields_loads_as_it_did(folder, tmp_path):
    assert {field.name for field in dataclasses.fields(NaraConfig)} - set(LATER) > set(ALWAYS_THERE)
    fields = json.loads((folder / CONFIG).read_text())
    older = {name: value for name, value in fields.items() if name not in LATER}
    assert len(older) == len(fields) - len(LATER)
    loaded = PeftModel.from_pretrained(reseeded_base(), written(folder, tmp_path, json.dumps(older)))
    x = torch.randn(3, 5, 7, generator=torch.Generator().manual_seed(3))
    assert torch.equal(output(loaded, x), output(saved(tmp_path / "again"), x))


REMOVED = {"core_normalization": "none", "noise_scale": "linear", "layer_embedding_dim": 16}


def test_file_with_the_default_of_a_removed_option_loads_as_it_did(folder, tmp_path):
    fields = json.loads((folder / CONFIG).read_text())
    assert not fields.keys() & REMOVED
    loaded = PeftModel.from_pretrained(reseeded_base(), written(folder, tmp_path, json.dumps(fields | REMOVED)))
    x = torch.randn(3, 5, 7, generator=torch.Generator().manual_seed(3))
    assert torch.equal(output(loaded, x), output(saved(tmp_path / "again"), x))
    config = config_from_fields(fields | REMOVED, "the file")
    assert config_to_fields(config) == config_to_fields(config_from_fields(fields, "the file"))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("core_normalization", "frobenius"),
        ("core_normalization", "centred"),
        ("noise_scale", "log_snr"),
        ("core_sharing", "layer_embedding"),
        ("core_type", "rank_mask_pairs"),
        ("core_type", "diagonal"),
    ],
)
def test_file_whose_core_depends_on_a_removed_option_is_refused_with_a_remedy(field, value, folder, tmp_path):
    refused_everywhere(altered(folder, tmp_path, **{field: value}), f"{field} '{value}'", "register_core")


# ---------------------------------------------------------------- files


@pytest.mark.parametrize(
    ("content", "part"),
    [
        ("", "JSONDecodeError"),
        ('{"peft_type": "NARA", ', "JSONDecodeError"),
        ("[" * 100_000, "RecursionError"),
        ('{"peft_type": "NARA", "r": ' + "[" * 100_000 + "]" * 100_000 + "}", "RecursionError"),
        ('{"peft_type": "NARA", "r": 1' + "0" * 5000 + "}", "can't be read"),
        ('{"peft_type": "NARA", "base": "café"}'.encode("latin-1"), "UnicodeDecodeError"),
        ("[1, 2]", "a list, where JSON's object belongs"),
        ("3", "a int"),
    ],
    ids=["empty", "cut off", "deep", "a deep field", "a long number", "not UTF-8", "a list", "a number"],
)
def test_a_file_that_is_no_json_object_is_refused_by_name(content, part, folder, tmp_path):
    refused_everywhere(written(folder, tmp_path, content), part, "damaged")


def test_a_field_that_stands_twice_is_refused_by_name(folder, tmp_path):
    text = (folder / CONFIG).read_text()
    refused_everywhere(written(folder, tmp_path, text.replace('"r": 4,', '"r": 4,\n  "r": 3,')), "has 'r' twice")
    pattern = text.replace('"rank_pattern": {}', '"rank_pattern": {"first": 2, "first": 3}')
    assert pattern != text
    refused_everywhere(written(folder, tmp_path, pattern), "has 'first' twice")


def test_a_file_without_a_peft_type_is_refused_by_name(folder, tmp_path):
    fields = json.loads((folder / CONFIG).read_text())
    del fields["peft_type"]
    refused_everywhere(written(folder, tmp_path, json.dumps(fields)), "peft_type is None")


def test_another_method_s_file_is_read_as_peft_reads_it(tmp_path):
    LoraConfig(r=3, target_modules=["first"]).save_pretrained(str(tmp_path))
    given = json.loads((tmp_path / CONFIG).read_text())
    (tmp_path / CONFIG).write_text(json.dumps(given | {"later": 3}))
    with pytest.warns(UserWarning, match="Unexpected keyword arguments"):
        read = PeftConfig.from_pretrained(str(tmp_path))
    assert type(read) is LoraConfig
    assert read.r == 3
    del given["peft_type"]
    (tmp_path / CONFIG).write_text(json.dumps(given))
    assert LoraConfig.from_pretrained(str(tmp_path)).r == 3


def test_the_file_that_is_altered_here_loads_as_it_is(folder):
    loaded, kept = PeftModel.from_pretrained(reseeded_base(), folder).state_dict(), saved(folder).state_dict()
    assert loaded.keys() == kept.keys()
    assert all(torch.equal(tensor, kept[name]) for name, tensor in loaded.items())


# ---------------------------------------------------------------- the class itself


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lora_alpha": float("nan")}, "lora_alpha is nan: pass a finite number"),
        ({"lora_alpha": float("-inf")}, "lora_alpha is -inf"),
        ({"lora_alpha": "16"}, "lora_alpha is '16'"),
        ({"lora_dropout": float("nan")}, "lora_dropout is nan: pass a number from 0 to less than 1"),
        ({"lora_dropout": -0.5}, "lora_dropout is -0.5"),
        ({"lora_dropout": 1.0}, "lora_dropout is 1.0"),
        ({"core_scale": float("nan")}, "core_scale is nan"),
        ({"fourier_scale": float("inf")}, "fourier_scale is inf"),
        ({"r": "4"}, "r is '4': pass a positive integer"),
        ({"r": -1}, "r is -1"),
        ({"r": 10**5000}, "r is a int too long to show"),
        ({"rank_pattern": {"first": True}}, "rank_pattern is {'first': True}"),
    ],
)
@pytest.mark.parametrize("core_type", ["hypernetwork", "constant", "identity"])
def test_a_number_that_is_none_is_refused_when_the_configuration_is_built(options, message, core_type):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
        NaraConfig(core_type=core_type, **options)


# ---------------------------------------------------------------- JSON


def test_a_config_survives_its_json_with_types(tmp_path):
    config = NaraConfig(
        r=6,
        lora_alpha=9,
        target_modules=["q_proj", "v_proj"],
        core_type="hypernetwork",
        core_scale=0.25,
        core_hidden_dims=[31, 7],
        core_init="zero_all",
        core_input="both",
        core_sharing="module_type",
        noise_embedding="mlp",
        noise_embedding_dim=10,
        fourier_scale=2.5,
        mask_density_radius=3,
        noise_convention="masked_share",
        rank_pattern={"q_proj": 4},
        use_dora=True,
    )
    config.save_pretrained(tmp_path)
    written = json.loads((tmp_path / "adapter_config.json").read_text())
    assert written["peft_type"] == "NARA"
    assert written["core_hidden_dims"] == [31, 7]
    for cls in (PeftConfig, NaraConfig, LoraConfig):
        loaded = cls.from_pretrained(tmp_path)
        assert type(loaded) is NaraConfig
        assert loaded == config
        assert loaded.core_hidden_dims == (31, 7)
        assert isinstance(loaded.core_hidden_dims, tuple)


def test_a_config_of_a_later_version_loads_with_a_warning_that_names_the_unknown_field(tmp_path):
    NaraConfig(r=6).save_pretrained(tmp_path)
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "core_flavour": "vanilla"}))
    with pytest.warns(UserWarning, match=r"Unexpected keyword arguments \['core_flavour'\] for class NaraConfig"):
        assert PeftConfig.from_pretrained(tmp_path).r == 6
