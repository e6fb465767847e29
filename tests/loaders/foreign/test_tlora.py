"""T-LoRA's files by other programs, against their published forward in float64, per sample.

Formats were read in tlora/model/lora.py and trainer_sdxl.py of ControlGenAI/T-LoRA, and lycoris/modules/tlora.py of
KohakuBlueleaf/LyCORIS with documentation/experimental/T_LORA.md of bghira/SimpleTuner; the writers are this project's.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from nara_diffusion import NaraConfig, to_lora_bins
from nara_diffusion.cli.main import main
from tests.helpers.adapted import relative_error
from tests.helpers.rounding import rounding_of
from tests.helpers.small_pipelines import small_flux, small_sdxl

RANK, LEAST = 6, 2
TIMESTEPS = torch.tensor([0, 130, 500, 749, 999])


def mask(timestep: int, rank: int = RANK, least: int = LEAST) -> Tensor:
    """m(t) (rank,): int((T − t) / T · (r − r_min)) + r_min ones, T = 1000."""
    active = (1000 - timestep) * (rank - least) // 1000 + least
    return torch.tensor([1.0] * active + [0.0] * (rank - active), dtype=torch.float64)


def orthogonal(layer: nn.Module, scale: float, generator: torch.Generator) -> dict[str, Tensor]:
    """Singular vectors of the base weight, as training starts and as it ends."""
    W = layer.weight.detach().double().flatten(1)
    U, S, Vh = torch.linalg.svd(W, full_matrices=False)
    base = {"p": U[:, :RANK], "lam": S[:RANK], "q": Vh[:RANK]}
    noise = {
        kind: t + scale * torch.randn(t.shape, generator=generator, dtype=torch.float64) for kind, t in base.items()
    }
    return {**noise, **{f"{kind}0": t for kind, t in base.items()}}


def as_in_float32(own: dict[str, Tensor]) -> dict[str, Tensor]:
    return {kind: tensor.float().double() for kind, tensor in own.items()}


def forward_by_hand(pipe: Any, layers: dict[str, dict[str, Tensor]], scale: float) -> Tensor:
    """The denoiser in float64 with y + scale (P (λ ⊙ m ⊙ Q x) − P⁰ (λ⁰ ⊙ m ⊙ Q⁰ x)) in those layers."""
    unet = pipe.unet.double()
    masks = torch.stack([mask(int(t)) for t in TIMESTEPS])[:, None]  # (b, 1, r)

    def add(own: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        for sign, end in ((1, ""), (-1, "0")):
            h = x @ own[f"q{end}"].T * own[f"lam{end}"] * masks
            y = y + sign * scale * h @ own[f"p{end}"].T
        return y

    handles = [
        unet.get_submodule(name).register_forward_hook(lambda m, args, y, own=own: add(own, args[0], y))
        for name, own in layers.items()
    ]
    found = predicted(unet)
    for handle in handles:
        handle.remove()
    pipe.unet.float()
    return found


def predicted(unet: Any) -> Tensor:
    generator = torch.Generator().manual_seed(9)
    n, dtype = len(TIMESTEPS), next(unet.parameters()).dtype
    sample, text, pooled = (
        torch.randn(n, *size, generator=generator).to(dtype) for size in ((4, 8, 8), (5, 40), (24,))
    )
    condition = {"text_embeds": pooled, "time_ids": torch.full((n, 6), 16.0, dtype=dtype)}
    with torch.no_grad():
        return unet(sample, TIMESTEPS, text, added_cond_kwargs=condition).sample


def authors_file(path: Path, pipe: Any, kind: str, change: float = 0.1) -> dict[str, dict[str, Tensor]]:
    """`AttnProcsLayers(unet.attn_processors).state_dict()` of their processors: attention of the whole UNet."""
    tensors, layers = {}, {}
    generator = torch.Generator().manual_seed(5)
    for processor in pipe.unet.attn_processors:
        for place in ("to_q", "to_k", "to_v", "to_out"):
            name = processor.removesuffix("processor") + (f"{place}.0" if place == "to_out" else place)
            own = as_in_float32(orthogonal(pipe.unet.get_submodule(name), change, generator))
            if kind == "lora":  # nn.Linear down and up, no λ, nothing subtracted
                own |= {"p0": 0 * own["p0"], "lam": torch.ones(RANK, dtype=torch.float64)}
                state = {"down.weight": own["q"], "up.weight": own["p"]}
            else:
                state = {
                    "q_layer.weight": own["q"], "p_layer.weight": own["p"], "lambda_layer": own["lam"][None],
                    "base_q.weight": own["q0"], "base_p.weight": own["p0"], "base_lambda": own["lam0"][None],
                }  # fmt: skip
            layers[name] = own
            tensors |= {f"{processor}.{place}_lora.{key}": t.float().contiguous() for key, t in state.items()}
    save_file(tensors, path, metadata={"format": "pt"})
    return layers


def lycoris_file(path: Path, pipe: Any, alpha: float, names: list[str]) -> dict[str, dict[str, Tensor]]:
    """What `LycorisNetwork` saves of TLoraModule: names joined by "_"; the start is not among them."""
    tensors, layers = {}, {}
    generator = torch.Generator().manual_seed(6)
    for name in names:
        layer = pipe.unet.get_submodule(name)
        own = orthogonal(layer, 0.1, generator)
        layers[name] = {k: t if k.endswith("0") else t.float().double() for k, t in own.items()}
        prefix, ones = f"lycoris_{name.replace('.', '_')}", [1] * (layer.weight.dim() - 2)
        tensors |= {
            f"{prefix}.q_layer.weight": own["q"].float().reshape(*own["q"].shape, *ones).contiguous(),
            f"{prefix}.p_layer.weight": own["p"].float().reshape(*own["p"].shape, *ones).contiguous(),
            f"{prefix}.lambda_layer": own["lam"].float()[None].contiguous(),
            f"{prefix}.alpha": torch.tensor(alpha),
        }
    save_file(tensors, path)
    return layers


def attention(pipe: Any) -> list[str]:
    return [name for name, _ in pipe.unet.named_modules() if name.endswith(("attn1.to_q", "attn2.to_k", "to_out.0"))]


@pytest.mark.parametrize("kind", ["ortho_lora", "lora"])
def test_files_of_the_authors_program_are_their_forward_per_sample(tmp_path, kind):
    pipe = small_sdxl()
    layers = authors_file(tmp_path / "pytorch_lora_weights.safetensors", pipe, kind)
    base, expected = predicted(pipe.unet), forward_by_hand(pipe, layers, 1.0)
    pipe.load_nara_weights(tmp_path, rank_mask_min=LEAST)
    found = predicted(pipe.unet)
    assert relative_error(found, expected) < 40 * rounding_of(pipe.unet)
    assert all(relative_error(base[i], expected[i]) > 1e-3 for i in range(len(TIMESTEPS)))
    config = pipe.unet.peft_config["default_0"]
    assert config.core_type == ("rank_mask" if kind == "lora" else "rank_mask_pairs")
    assert config.noise_convention == "timestep"


def test_files_of_lycoris_are_its_forward_per_sample_and_saved_in_our_format(tmp_path):
    pipe = small_sdxl()
    layers = lycoris_file(tmp_path / "theirs.safetensors", pipe, 4.5, attention(pipe))
    expected = forward_by_hand(pipe, layers, 4.5 / RANK)
    pipe.load_nara_weights(tmp_path / "theirs.safetensors", "toy", rank_mask_min=LEAST)
    assert relative_error(predicted(pipe.unet), expected) < 40 * rounding_of(pipe.unet)
    pipe.save_nara_weights(tmp_path / "ours", adapter_name="toy")
    other = small_sdxl()
    other.load_nara_weights(tmp_path / "ours")
    assert torch.equal(predicted(other.unet), predicted(pipe.unet))
    bins = to_lora_bins(pipe.unet, adapter_name="toy")
    assert bins.error.worst_update < 1e-6
    assert [lora.config.r for lora in bins.loras] == [12, 10, 8, 6, 4]


def test_half_precision_keeps_the_small_difference_of_two_large_terms(tmp_path):
    full, half = small_sdxl(), small_sdxl()
    half.unet.bfloat16()
    layers = authors_file(tmp_path / "theirs.safetensors", full, "ortho_lora", change=1e-3)
    for pipe in (full, half):
        pipe.load_nara_weights(tmp_path / "theirs.safetensors", "toy", rank_mask_min=LEAST)
    for name, own in layers.items():
        expected = own["p"] * own["lam"] @ own["q"] - own["p0"] * own["lam0"] @ own["q0"]
        for pipe, tolerance in ((full, 1e-6), (half, 0.01)):
            layer = pipe.unet.get_submodule(name)
            update = layer.lora_B["toy"].weight.double() @ layer.lora_A["toy"].weight.double()
            assert relative_error(update, expected) < tolerance
        rounded = {kind: tensor.bfloat16().double() for kind, tensor in own.items()}
        naive = rounded["p"] * rounded["lam"] @ rounded["q"] - rounded["p0"] * rounded["lam0"] @ rounded["q0"]
        assert relative_error(naive, expected) > 0.1


def damaged(tensors: dict[str, Tensor], change: str) -> dict[str, Tensor]:
    first = next(key for key in tensors if key.endswith("q_layer.weight"))
    prefix = first.removesuffix("q_layer.weight")
    if change == "missing":
        return {key: t for key, t in tensors.items() if key != f"{prefix}p_layer.weight"}
    if change == "other rank":
        rank = {f"{prefix}{kind}" for kind in ("lambda_layer",)}
        return {key: t[:, :-1].contiguous() if key in rank else t for key, t in tensors.items()}
    if change == "text encoder":
        return tensors | {"lora_te1_text_model_q_proj.lambda_layer": torch.ones(1, RANK)}
    if change == "other scale":
        return tensors | {f"{prefix}alpha": torch.tensor(1.0)}
    if change == "unknown module":
        return {key.replace(prefix, "lycoris_input_blocks_4_1_to_q."): t for key, t in tensors.items()}
    return tensors | {f"{prefix}dora_scale": torch.ones(3)}


@pytest.mark.parametrize(
    ("change", "least", "message"),
    [
        (None, None, "is a T-LoRA, and doesn't say how many directions stay in pure noise: pass rank_mask_min="),
        (None, 7, "rank_mask_min is 7: pass an integer from 1 to 6"),
        (None, 0, "rank_mask_min is 0: pass an integer from 1 to 6"),
        ("missing", 2, "but not all of"),
        ("other rank", 2, "which have no rank in common"),
        ("text encoder", 2, "text encoders run before there is a λ"),
        ("other scale", 2, "one for all can be expressed"),
        ("unknown module", 2, "'input_blocks_4_1_to_q', which is no module of UNet2DConditionModel"),
        ("dora", 2, "this field of LyCORIS can't be expressed"),
    ],
)
def test_what_can_t_be_expressed_is_refused_by_name_and_changes_nothing(tmp_path, change, least, message):
    pipe = small_sdxl()
    before = {name for name, _ in pipe.unet.named_modules()}
    lycoris_file(tmp_path / "theirs.safetensors", pipe, 4.5, attention(pipe))
    tensors = load_file(tmp_path / "theirs.safetensors")
    with pytest.raises(ValueError, match=message):
        pipe.load_nara_weights(tensors if change is None else damaged(tensors, change), rank_mask_min=least)
    assert {name for name, _ in pipe.unet.named_modules()} == before


def test_convolutions_of_several_pixels_and_several_ranks_are_refused(tmp_path):
    pipe = small_sdxl()
    lycoris_file(tmp_path / "a.safetensors", pipe, 4.5, ["conv_out"])
    with pytest.raises(ValueError, match=r"is a convolution of 3×3"):
        pipe.load_nara_weights(tmp_path / "a.safetensors", rank_mask_min=1)
    first, second = attention(pipe)[:2]
    lycoris_file(tmp_path / "b.safetensors", pipe, 4.5, [first, second])
    tensors, prefix = load_file(tmp_path / "b.safetensors"), f"lycoris_{second.replace('.', '_')}"
    for kind, part in (("q_layer.weight", (slice(4),)), ("p_layer.weight", (slice(None), slice(4))),
                       ("lambda_layer", (slice(None), slice(4)))):  # fmt: skip
        tensors[f"{prefix}.{kind}"] = tensors[f"{prefix}.{kind}"][part].contiguous()
    tensors[f"{prefix}.alpha"] = torch.tensor(3.0)
    with pytest.raises(ValueError, match="has layers of ranks 4, 6: T-LoRA masks all layers by one rank"):
        pipe.load_nara_weights(tensors, rank_mask_min=1)


def test_a_convolution_of_one_pixel_is_read(tmp_path):
    pipe = small_sdxl()
    name = next(n for n, m in pipe.unet.named_modules() if n.endswith("conv_shortcut"))
    own = lycoris_file(tmp_path / "a.safetensors", pipe, 3.0, [name])[name]
    pipe.load_nara_weights(tmp_path / "a.safetensors", "toy", rank_mask_min=1)
    layer = pipe.unet.get_submodule(name)
    update = (
        layer.scaling["toy"]
        * layer.lora_B["toy"].weight.double().flatten(1)
        @ layer.lora_A["toy"].weight.double().flatten(1)
    )
    expected = 0.5 * (own["p"] * own["lam"] @ own["q"] - own["p0"] * own["lam0"] @ own["q0"])
    assert relative_error(update, expected) < 1e-6


def test_rank_mask_min_is_refused_where_it_has_no_meaning(tmp_path):
    pipe = small_sdxl()
    pipe.unet.add_adapter(NaraConfig(target_modules=["to_q"], r=2))
    pipe.save_nara_weights(tmp_path)
    with pytest.raises(ValueError, match="rank_mask_min is for a T-LoRA of another program"):
        small_sdxl().load_nara_weights(tmp_path, rank_mask_min=1)


def test_a_lora_by_old_names_is_still_no_nara(tmp_path):
    pipe = small_sdxl()
    authors_file(tmp_path / "pytorch_lora_weights.safetensors", pipe, "lora")
    with pytest.raises(ValueError, match="is a LoRA, without core"):
        pipe.load_nara_weights(tmp_path)
    with pytest.raises(ValueError, match=r"which FluxTransformer2DModel lacks"):
        small_flux().load_nara_weights(tmp_path, rank_mask_min=1)


def test_nara_inspect_says_which_program_wrote_it(tmp_path):
    pipe = small_sdxl()
    lycoris_file(tmp_path / "theirs.safetensors", pipe, 4.5, attention(pipe)[:1])
    with pytest.raises(SystemExit, match=r"is a T-LoRA of LyCORIS: pipe\.load_nara_weights reads it"):
        main(["inspect", str(tmp_path / "theirs.safetensors")])
