"""Tiny checkpoints in LLaDA's and Dream's own formats and of Stable Diffusion XL, tiny data, and runs on them."""

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState, GradientState
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

from nara_diffusion.dllm.models.llada_format import checkpoint_name
from nara_diffusion.training.output import hub
from tests.helpers.small_pipelines import small_sdxl
from train_scripts.dllm import Arguments

from .dreambooth_runs import write_pictures

SHIPPED = Path(__file__).parents[2] / "examples" / "assets" / "llada-tiny"
SIZES = {
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 1024,
    "tie_word_embeddings": False,
}
LLADA_SIZES = {
    "d_model": 24,
    "mlp_hidden_size": 40,
    "n_layers": 2,
    "n_heads": 4,
    "n_kv_heads": 2,
    "max_sequence_length": 1024,
}


@pytest.fixture(autouse=True)
def _fresh_accelerate() -> Iterator[None]:
    yield
    AcceleratorState._reset_state(True)
    GradientState._reset_state()


def shipped_config() -> dict[str, Any]:
    return json.loads((SHIPPED / "config.json").read_text())


def copy_tokenizer(folder: Path) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(SHIPPED / name, folder)


@pytest.fixture(scope="session")
def llada_folder(tmp_path_factory) -> Path:
    """Random weights in LLaDA's format, with the shipped tokenizer."""
    folder = tmp_path_factory.mktemp("llada")
    fields = shipped_config()
    torch.manual_seed(3)
    model = LlamaForCausalLM(LlamaConfig(vocab_size=fields["vocab_size"], **SIZES))
    save_file({checkpoint_name(key): value for key, value in model.state_dict().items()}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(fields | LLADA_SIZES))
    copy_tokenizer(folder)
    return folder


@pytest.fixture(scope="session")
def dream_folder(tmp_path_factory) -> Path:
    """The same in Dream's format."""
    folder = tmp_path_factory.mktemp("dream")
    shipped = shipped_config()
    torch.manual_seed(4)
    Qwen2ForCausalLM(Qwen2Config(vocab_size=shipped["vocab_size"], **SIZES)).save_pretrained(folder)
    fields = json.loads((folder / "config.json").read_text()) | {"model_type": "Dream", "architectures": ["DreamModel"]}
    fields |= {name: shipped[name] for name in ("mask_token_id", "eos_token_id", "pad_token_id")}
    (folder / "config.json").write_text(json.dumps(fields))
    copy_tokenizer(folder)
    return folder


def write_jsonl(path: Path, records: list[dict[str, str]]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def words(count: int, seed: int) -> list[dict[str, str]]:
    """Records with answers of unequal lengths."""
    generator = torch.Generator().manual_seed(seed)
    records = []
    for _ in range(count):
        length = int(torch.randint(2, 6, (), generator=generator))
        text = "".join(chr(97 + int(torch.randint(26, (), generator=generator))) for _ in range(length))
        records.append({"instruction": f"upper: {text}", "output": text.upper(), "answer": text.upper()})
    return records


@pytest.fixture(scope="session")
def data(tmp_path_factory) -> dict[str, str]:
    """Paths of train, validation and test files, as arguments."""
    folder = tmp_path_factory.mktemp("data")
    sizes = {"train": 11, "validation": 6, "test": 5}
    return {
        f"{name}_file": str(write_jsonl(folder / f"{name}.jsonl", words(size, seed=size)))
        for name, size in sizes.items()
    }


@pytest.fixture
def arguments(llada_folder: Path, data: dict[str, str], tmp_path: Path) -> Callable[..., Arguments]:
    """Arguments of a run of a few seconds; keyword arguments change them."""
    defaults: dict[str, Any] = {
        "pretrained_model_name_or_path": str(llada_folder),
        **data,
        "output_dir": str(tmp_path / "run"),
        "rank": 3,
        "target_modules": ["all-linear"],
        "trained_padding": "3",
        "core_learning_rate": 1e-3,
        "lr_scheduler": "cosine",
        "core_hidden_dims": [8, 8],
        "train_batch_size": 4,
        "max_train_steps": 4,
        "max_length": 40,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "validation_steps": 2,
        "checkpointing_steps": None,
        "eval_batch_size": 4,
        "gen_length": 4,
        "curve_points": 3,
    }
    return lambda **changes: Arguments(**{**defaults, **changes})


@pytest.fixture
def uploads(monkeypatch) -> list[set[str]]:
    """What runs push to the Hub, as the user "me": the names of the files of each upload."""
    found: list[set[str]] = []

    class Api:
        def create_repo(self, name: str, exist_ok: bool) -> SimpleNamespace:
            return SimpleNamespace(repo_id=f"me/{name}")

        def upload_folder(self, folder_path: str, **arguments: Any) -> None:
            found.append({path.name for path in Path(folder_path).iterdir()})

    monkeypatch.setattr(hub, "HfApi", Api)
    return found


@pytest.fixture(scope="session")
def sdxl_folder(tmp_path_factory) -> Path:
    """A tiny random Stable Diffusion XL."""
    folder = tmp_path_factory.mktemp("sdxl")
    small_sdxl().save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def pictures(tmp_path_factory) -> Path:
    """Three pictures of one size."""
    return write_pictures(tmp_path_factory.mktemp("pictures"), 3)
