"""λ and the mask density: what is taken for them, what is refused, and what a model reads."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel
from torch import Tensor
from transformers import LlamaForCausalLM

from nara_diffusion import noise_level
from nara_diffusion.noise.denoisers import _DENOISERS, register_denoiser
from nara_diffusion.noise.needs import is_noise_aware, mask_density_radius, needs_mask_density
from tests.helpers.adapted import TwoLayers, adapted, core_by_hand, nara_config, relative_error
from tests.helpers.two_layers import LEVELS, TARGETS, by_hand, expect, run

# ---------------------------------------------------------------------- values


@pytest.mark.parametrize(
    "value",
    [
        0,
        1,
        0.0,
        1.0,
        0.37,
        np.float64(0.37),
        np.float32(0.37),
        np.int64(1),
        torch.tensor(0.37),
        torch.tensor([0.37]),
        torch.tensor(0.37, dtype=torch.float64),
        torch.tensor([0.37], dtype=torch.float16),
        LEVELS,
        LEVELS.double(),
        LEVELS.bfloat16(),
        torch.tensor([0, 1, 1]),
        torch.tensor([1.0, 0.0, 0.5], requires_grad=True),
        LEVELS.repeat(2)[::2],
        LEVELS.tolist(),
        tuple(LEVELS.tolist()),
        [0, 1, 0.5],
        [np.float32(0.1), torch.tensor(0.7), 1],
        LEVELS.numpy(),
        LEVELS.double().numpy()[::-1],
        np.array(0.37),
    ],
)
def test_a_level_may_be_a_number_or_one_number_a_sample(model: PeftModel, x: Tensor, value: Any) -> None:
    with noise_level(model, value):
        output = run(model, x)
    level = torch.tensor(np.array(value.detach().float() if isinstance(value, Tensor) else value, dtype=np.float32))
    assert relative_error(output, expect(model, x, level)) < 2e-6


@pytest.mark.parametrize(
    ("value", "said"),
    [
        (float("nan"), r"noise_level is \[nan\].*\[0, 1\], where 1 is pure noise"),
        (float("inf"), r"noise_level is \[inf\].*\[0, 1\]"),
        (-0.01, r"noise_level is \[-0.0\d+\].*\[0, 1\]"),
        (1.01, r"noise_level is \[1.0\d+\].*\[0, 1\]"),
        (500, r"noise_level is \[500.0\].*\[0, 1\]"),
        (torch.tensor([0.2, float("nan"), 0.1]), r"nan.*\[0, 1\]"),
        (torch.tensor([0.2, 1.5, 0.1]), r"1.5.*\[0, 1\]"),
        (torch.tensor([[0.2, 0.5, 0.1]]), r"shape \(1, 3\).*one number, or a tensor of shape \(batch,\)"),
        (torch.zeros(3, 1), r"shape \(3, 1\).*shape \(batch,\)"),
        (torch.zeros(0), r"shape \(0,\).*shape \(batch,\)"),
        (torch.tensor([True, False, True]), r"torch.bool.*one number"),
        (torch.tensor([0.1 + 0j]), r"complex.*one number"),
        (np.bool_(True), r"dtype torch.bool: pass one number"),
        (True, r"dtype torch.bool: pass one number"),
        (
            [[0.1], [0.2, 0.3]],
            r"noise_level is \[\[0.1\], \[0.2, 0.3\]\]: pass a number in \[0, 1\], or a tensor, array or list",
        ),
        (np.array([[0.1, 0.2]]), r"shape \(1, 2\)"),
        ([], r"shape \(0,\)"),
        (10**400, r"pass a number in \[0, 1\]"),
        ("0.3", r"noise_level is '0.3': pass a number in \[0, 1\]"),
        (None, r"noise_level is None: pass a number in \[0, 1\]"),
    ],
)
def test_what_is_no_level_is_refused(model: PeftModel, value: Any, said: str) -> None:
    with pytest.raises(ValueError, match=said), noise_level(model, value):
        pytest.fail("the context was entered")


@pytest.mark.parametrize("length", [2, 4])
def test_a_level_of_the_wrong_length_names_layer_and_batch(model: PeftModel, x: Tensor, length: int) -> None:
    with (
        noise_level(model, torch.rand(length)),
        pytest.raises(ValueError, match=rf"noise_level has {length} values, .* layer '.*first' is 3: pass one value"),
    ):
        model(x)


@pytest.fixture
def _films_repeat_samples() -> Iterator[None]:
    register_denoiser("Film", sample_major=True)
    yield
    _DENOISERS.pop("Film")


class Film(TwoLayers):
    """A denoiser whose second layer sees three frames of each sample."""

    def forward(self, x: Tensor, timestep: Tensor) -> Tensor:  # type: ignore[override]
        return self.second(torch.tanh(self.first(x)).repeat_interleave(3, dim=0))


@pytest.mark.usefixtures("_films_repeat_samples")
def test_where_layers_see_repeats_of_the_batch_the_level_still_has_its_length() -> None:
    model = adapted(Film(), target_modules=TARGETS)
    x, t = torch.randn(4, 7), torch.tensor([500])
    levels = torch.rand(4)
    with noise_level(model, levels), torch.no_grad():
        outputs = model(x, t)
        assert torch.equal(model(timestep=t, x=x), outputs)
    for row, level in enumerate(levels):
        with noise_level(model, level), torch.no_grad():
            assert relative_error(outputs[3 * row : 3 * row + 3], model(x[row : row + 1], t)) < 1e-6
    for length in (2, 12):  # divides the rows that a layer sees, or equals them
        with (
            noise_level(model, torch.rand(length)),
            pytest.raises(ValueError, match=f"noise_level has {length} values, but the batch is 4: pass one value"),
        ):
            model(x, t)


def test_samples_get_their_own_level(model: PeftModel, x: Tensor) -> None:
    order = torch.tensor([2, 0, 1])
    with noise_level(model, LEVELS):
        output = run(model, x)
    with noise_level(model, LEVELS[order]):
        assert relative_error(run(model, x[order]), output[order]) < 1e-6
        assert relative_error(run(model, x), output) > 0.02


def test_a_level_is_what_it_was_on_entry(model: PeftModel, x: Tensor) -> None:
    """A loop that reuses its tensor does not move the λ of a context that is open."""
    level = LEVELS.clone()
    with noise_level(model, level):
        level.fill_(7.0)
        assert relative_error(run(model, x), expect(model, x, LEVELS)) < 2e-6


def test_beams_and_repeats_have_to_be_told(tiny_llama: LlamaForCausalLM) -> None:
    tiny_llama.config.is_causal = True
    model = adapted(tiny_llama, target_modules=["q_proj", "v_proj"])
    ids = torch.randint(1, 49, (2, 4))
    options: dict[str, Any] = {"max_new_tokens": 2, "num_beams": 2, "attention_mask": torch.ones_like(ids)}
    with (
        noise_level(model, torch.tensor([0.2, 0.8])),
        pytest.raises(ValueError, match=r"2 values, but the batch inside layer .*q_proj' is 4.*beams"),
    ):
        model.generate(input_ids=ids, **options)
    with noise_level(model, 0.2):
        shared = model.generate(input_ids=ids, **options)
    with noise_level(model, torch.full((4,), 0.2)):
        assert torch.equal(model.generate(input_ids=ids, **options), shared)


# ---------------------------------------------------------------------- the mask density


def density_model(core_input: str) -> PeftModel:
    return adapted(TwoLayers(), target_modules=TARGETS, core_input=core_input, mask_density_radius=3)


@pytest.mark.parametrize("core_input", ["mask_density", "both"])
@pytest.mark.parametrize(
    ("level", "density"),
    [(LEVELS, LEVELS.flip(0)), (0.3, LEVELS), (LEVELS, 0.3), (0.3, 0.8), (0.3, torch.tensor([0.8]))],
)
def test_level_and_density_may_each_be_shared_by_the_batch(
    x: Tensor, core_input: str, level: float | Tensor, density: float | Tensor
) -> None:
    model = density_model(core_input)
    with noise_level(model, level, mask_density=density):
        output = run(model, x)
    rows = [torch.as_tensor(signal, dtype=torch.float32).expand(3) for signal in (level, density)]
    prefix = "base_model.model.nara_core.cores.default.shared."
    core = core_by_hand(model.state_dict(), prefix, model.peft_config["default"], *rows)
    assert relative_error(output, by_hand(model, x, core)) < 2e-6


def test_a_density_that_does_not_fit_is_refused(x: Tensor) -> None:
    model = density_model("both")
    with (
        pytest.raises(ValueError, match=r"mask_density has 2 values, noise_level 3: pass one value, or one a sample"),
        noise_level(model, LEVELS, mask_density=torch.rand(2)),
    ):
        pytest.fail("the context was entered")
    with pytest.raises(ValueError, match=r"mask_density is \[1.5\]"), noise_level(model, 0.3, mask_density=1.5):
        pytest.fail("the context was entered")
    with noise_level(model, 0.3), pytest.raises(ValueError, match=r"mask density is not known.*mask_density="):
        model(x)


def test_what_a_model_reads() -> None:
    assert not is_noise_aware(TwoLayers())
    assert is_noise_aware(adapted(TwoLayers(), target_modules=TARGETS))
    assert not is_noise_aware(adapted(TwoLayers(), target_modules=TARGETS, core_type="constant"))
    model = density_model("both")
    assert needs_mask_density(model)
    assert mask_density_radius(model) == 3
    with model.disable_adapter():
        assert not is_noise_aware(model)
        assert not needs_mask_density(model)
    model.add_adapter("far", nara_config(target_modules=TARGETS, core_input="both", mask_density_radius=9))
    model.base_model.set_adapter(["default", "far"])
    with pytest.raises(ValueError, match=r"different radii, \[3, 9\]"):
        mask_density_radius(model)
