"""What a checkpoint knows its data and its base model by."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from nara_diffusion.training.checkpoints.digests import (
    digest_base,
    digest_file,
    digest_texts,
    local_folder,
    weight_files,
)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A model in four files, as transformers writes it."""
    config = LlamaConfig(vocab_size=9, hidden_size=8, intermediate_size=6, num_hidden_layers=2, num_attention_heads=2)
    torch.manual_seed(5)
    LlamaForCausalLM(config).save_pretrained(tmp_path / "model", max_shard_size="1KB")
    return tmp_path / "model"


def test_digest_base_shows_the_change_of_one_bit_in_any_file(folder: Path) -> None:
    before = digest_base({"": folder})
    assert before.keys() == {"base model", "base model configuration config.json"}
    shards = weight_files(folder)
    assert len(shards) == len(list(folder.glob("*.safetensors"))) > 2
    for file in shards:
        content = file.read_bytes()
        file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        after = digest_base({"": folder})
        assert [name for name in before if after[name] != before[name]] == ["base model"]
        file.write_bytes(content)
    (folder / "config.json").write_text("{}")
    after = digest_base({"": folder})
    assert [name for name in before if after[name] != before[name]] == ["base model configuration config.json"]


def test_digest_base_is_of_contents_and_components(folder: Path) -> None:
    before = digest_base({"unet": folder})
    shutil.copytree(folder, folder.parent / "copy")
    assert digest_base({"unet": folder.parent / "copy"}) == before
    assert "base model configuration unet/config.json" in before
    assert digest_base({"vae": folder})["base model"] != before["base model"]


def test_weight_files_are_those_that_are_loaded(tmp_path: Path) -> None:
    names = ("model.safetensors", "model.fp16.safetensors", "pytorch_model.bin", "consolidated.safetensors")
    for name in names:
        (tmp_path / name).write_text(name)
    assert weight_files(tmp_path) == [tmp_path / "model.safetensors"]
    assert weight_files(tmp_path, "fp16") == [tmp_path / "model.fp16.safetensors"]
    assert weight_files(tmp_path, "bf16") == [tmp_path / "model.safetensors"]
    for name in names[:2]:
        (tmp_path / name).unlink()
    assert weight_files(tmp_path, "fp16") == [tmp_path / "pytorch_model.bin"]
    weights = {"a": "two.safetensors", "b": "one.safetensors", "c": "two.safetensors"}
    (tmp_path / "diffusion_pytorch_model.safetensors.index.fp16.json").write_text(json.dumps({"weight_map": weights}))
    assert weight_files(tmp_path, "fp16") == [tmp_path / "one.safetensors", tmp_path / "two.safetensors"]


def test_local_folder_of_a_repository_is_its_snapshot(folder: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache" / "models--someone--model"
    commit = "0123456789abcdef0123456789abcdef01234567"
    shutil.copytree(folder, cache / "snapshots" / commit)
    (cache / "refs").mkdir()
    (cache / "refs" / "main").write_text(commit)
    found = local_folder("someone/model", cache_dir=str(tmp_path / "cache"))
    assert digest_base({"": found}) == digest_base({"": local_folder(str(folder))})


def test_digest_file_is_sha256(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"abc")
    assert digest_file(tmp_path / "file").startswith("ba7816bf8f01cfea")


def test_digest_of_texts_knows_where_one_ends() -> None:
    assert digest_texts(["ab", "c"]) != digest_texts(["a", "bc"])
    assert digest_texts(["\ud800"]) == digest_texts(["\ud800"])
