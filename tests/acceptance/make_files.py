"""Writes files/: adapters of the package's version 0.1, what they say, and what they were exported to.

    PYTHONPATH=. python tests/acceptance/make_files.py

It was run once, at the commit that files/bases.json names, and is kept to show what is in the files. Tests never write
them: a file of 0.1 has to load into every later version.

    bases.json            SHA-256 of each base's parameters; where and by which versions the files were made
    peft/NAME/            folders of PeftModel.save_pretrained; peft/checkpoint-2 is of train_scripts/dllm.py
    pipelines/NAME_DTYPE/ folders of pipe.save_nara_weights
    exports/              plain LoRAs of some of them, by `nara fold` at λ = 0.375
    */outputs.safetensors what the base with the adapter says in float32, "NAME" or "NAME.component"
"""

from __future__ import annotations

import json
import shutil
import subprocess
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, get_peft_model, inject_adapter_in_model
from safetensors.torch import save_file
from torch import nn

from nara_diffusion import NaraConfig, StrengthSchedule
from nara_diffusion.dllm import load_backbone
from tests.acceptance import _bases, _files

SMALL = {"r": 3, "lora_alpha": 5, "core_scale": 0.7, "core_hidden_dims": (9, 10), "noise_embedding_dim": 8}
TEXT = {"target_modules": ["q_proj", "v_proj", "down_proj"], "noise_convention": "masked_share"}
V_PREDICTION = {
    "_class_name": "EulerDiscreteScheduler",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "prediction_type": "v_prediction",
}

PEFT: dict[str, dict[str, Any]] = {
    "nara": TEXT | {"rank_pattern": {"v_proj": 2}, "alpha_pattern": {"q_proj": 7}, "task_type": "CAUSAL_LM"},
    "nara_dora": TEXT | {"use_dora": True, "core_init": "kaiming"},
    "knots": TEXT | {"core_type": "knots", "core_knots": 4, "core_sharing": "layer"},
    "constant": TEXT | {"core_type": "constant", "use_rslora": True, "modules_to_save": ["lm_head"]},
    "rank_mask": TEXT | {"core_type": "rank_mask", "r": 4, "rank_mask_min": 1, "lora_a_init": "orthogonal"},
    "bins": TEXT | {"core_type": "bins", "r": 6, "core_bins": 3},
    "module_type": TEXT | {"core_sharing": "module_type", "core_input": "both", "noise_embedding": "mlp"},
    "layer": TEXT | {"core_sharing": "layer", "noise_embedding": "raw"},
    "strength": TEXT | {"strength": StrengthSchedule([(0, 1.0), (0.5, 0.25), (0.75, 0.75)])},
    "mixed": {"target_modules": ["tokens", "near", "groups", "head"], "r": 4, "core_sharing": "module_type"},
    "converted": {"target_modules": ["to_q", "conv_in"], "noise_convention": "timestep", "scheduler": V_PREDICTION},
}
UNET = {
    "sdxl": {
        "target_modules": r"conv_in|time_embedding\.linear_2|.*(down_blocks\.1\.attentions\.1|mid_block\.attentions).*"
        r"(to_q|to_k|to_v|to_out\.0|ff\.net\.2)|(down_blocks\.1|up_blocks\.1)\.resnets\.0\.(conv1|conv_shortcut)"
        r"|mid_block\.resnets\.1\.(conv2|time_emb_proj)|up_blocks\.0\.(attentions\.2\.proj_out|upsamplers\.0\.conv)"
        r"|down_blocks\.0\.downsamplers\.0\.conv",
        "rank_pattern": {"conv1": 2},
        "alpha_pattern": {"to_v": 7},
    },
    "sdxl_unet": {"target_modules": r"up_blocks\.0\..*(attn1\.to_q|proj_in|conv2)", "use_dora": True},
}
ATTENTION = ["to_q", "to_k", "to_v", "add_q_proj", "add_k_proj", "add_v_proj", "to_out.0", "to_add_out"]
FLUX = {
    "target_modules": [
        *ATTENTION,
        "ff.net.0.proj",
        "ff_context.net.2",
        "proj_mlp",
        "single_transformer_blocks.0.proj_out",
        "norm1.linear",
    ],
    "core_type": "knots",
    "core_knots": 3,
    "core_sharing": "layer",
    "strength": [[0.0, 0.5], [1.0, 1.0]],
}


def train(model: nn.Module, seed: str) -> None:
    """Another value for each tensor that training changes: no zero and no identity is left."""
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            value = _bases.drawn(f"{seed}.{name}", *parameter.shape)
            parameter.data.copy_(value.abs() + 0.5 if "magnitude" in name else value / 2)


def save_peft(folder: Path) -> dict[str, torch.Tensor]:
    outputs = {}
    for name, options in PEFT.items():
        torch.manual_seed(0)  # of the frequencies, which are in the file
        base = {"mixed": _bases.mixed_model, "converted": _bases.unet}.get(name, _bases.language_model)()
        model = get_peft_model(base, NaraConfig(**SMALL | options))
        train(model, name)
        model.eval().save_pretrained(str(folder / name))
        (folder / name / "README.md").unlink()
        if name == "converted":
            pipe = _bases.sdxl()
            pipe.unet = model.base_model.model
            outputs[name] = _bases.sdxl_outputs(pipe)["unet"]
        else:
            outputs[name] = _bases.text_output(model)
    outputs["base.language"] = _bases.plain_text_output(_bases.language_model())
    outputs["base.mixed"] = _bases.plain_text_output(_bases.mixed_model())
    return outputs


def save_checkpoint(folder: Path) -> dict[str, torch.Tensor]:
    """The adapter of a checkpoint that a run of two steps left, on the shipped llada-tiny."""
    from nara_diffusion.dllm.train import Arguments, main

    run = folder / "run"
    data = str(_files.ROOT / "examples/assets/two-step/train.jsonl")
    options = {"train_file": data, "rank": 2, "core_hidden_dims": [6, 6], "target_modules": ["q_proj", "v_proj"]}
    short = {
        "max_train_steps": 2,
        "checkpointing_steps": 2,
        "train_batch_size": 2,
        "gen_length": 12,
    }
    main(
        Arguments(
            pretrained_model_name_or_path="examples/assets/llada-tiny",
            output_dir=str(run),
            learning_rate=0.05,
            core_learning_rate=0.05,
            **options,
            **short,
        )
    )
    (folder / "checkpoint-2").mkdir()
    for name in (_files.PEFT_WEIGHTS, _files.PEFT_CONFIG):
        shutil.copy(run / "checkpoint-2" / name, folder / "checkpoint-2")
    shutil.rmtree(run)
    model = PeftModel.from_pretrained(load_backbone("examples/assets/llada-tiny")[0], folder / "checkpoint-2").eval()
    return {"checkpoint-2": _bases.shipped_output(model)}


def adapted_pipe(name: str) -> Any:
    torch.manual_seed(0)
    pipe = _bases.PIPELINES[name][0]()
    if name == "flux":
        pipe.transformer.add_adapter(NaraConfig(**SMALL | FLUX | {"noise_convention": "flow"}), "default")
        train(pipe.transformer, name)
        return pipe
    pipe.unet.add_adapter(NaraConfig(**SMALL | UNET[name] | {"noise_convention": "timestep"}), "default")
    train(pipe.unet, name)
    if name == "sdxl":
        attention = ["q_proj", "k_proj", "v_proj", "out_proj"]
        for part, core in (("text_encoder", "identity"), ("text_encoder_2", "constant")):
            config = NaraConfig(r=2, lora_alpha=3, core_type=core, core_scale=0.7, target_modules=attention)
            inject_adapter_in_model(config, getattr(pipe, part), "default")
            train(getattr(pipe, part), part)
    return pipe


def save_pipelines(folder: Path) -> dict[str, torch.Tensor]:
    outputs = {}
    for name, (base, say) in _bases.PIPELINES.items():
        for kind, dtype in (("float32", torch.float32), ("bfloat16", torch.bfloat16)):
            pipe = adapted_pipe(name)
            pipe.to(dtype=dtype)
            pipe.save_nara_weights(folder / f"{name}_{kind}")
            exact = base()
            exact.load_nara_weights(folder / f"{name}_{kind}")
            outputs |= {f"{name}_{kind}.{part}": value for part, value in say(exact).items()}
        outputs |= {f"base.{name}.{part}": value for part, value in say(base()).items()}
    return outputs


def save_exports(folder: Path) -> None:
    nara = _files.command()
    for name in ("sdxl", "flux"):
        for form in ("kohya", "comfyui", "diffusers"):
            source = str(_files.FILES / "pipelines" / f"{name}_float32")
            words = ["--form", form, "--base", name, "--noise_level", str(_files.FOLD_LEVEL)]
            nara(["fold", source, str(folder / f"{name}_{form}.safetensors"), *words])
    source, words = str(_files.FILES / "peft" / "nara"), ["--form", "peft", "--noise_level", str(_files.FOLD_LEVEL)]
    nara(["fold", source, str(folder / "nara_peft"), *words])


def main() -> None:
    for kind in ("peft", "pipelines", "exports"):
        shutil.rmtree(_files.FILES / kind, ignore_errors=True)
        (_files.FILES / kind).mkdir(parents=True)
    outputs = save_peft(_files.FILES / "peft") | save_checkpoint(_files.FILES / "peft")
    save_file(
        {name: value.contiguous() for name, value in outputs.items()}, _files.FILES / "peft" / "outputs.safetensors"
    )
    save_file(save_pipelines(_files.FILES / "pipelines"), _files.FILES / "pipelines" / "outputs.safetensors")
    save_exports(_files.FILES / "exports")
    last = ["git", "log", "-1", "--format=%H", "--", "nara_diffusion", "train_scripts"]
    commit = subprocess.run(last, capture_output=True, text=True, check=True).stdout.strip()
    packages = ("torch", "peft", "diffusers", "transformers", "safetensors")
    content = {
        "made": {"commit": commit, **{name: version(name) for name in packages}},
        "sha256": {name: _bases.digest(make()) for name, make in _bases.BASES.items()},
    }
    (_files.FILES / "bases.json").write_text(json.dumps(content, indent=2) + "\n")


if __name__ == "__main__":
    main()
