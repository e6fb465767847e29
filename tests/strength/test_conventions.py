"""A LoRA with a StrengthSchedule beside NaRAs of other definitions of λ, in every order; two NaRAs that are refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import EulerDiscreteScheduler
from torch import Tensor

from nara_diffusion import set_noise_source, set_strength
from nara_diffusion.loaders import insertion
from nara_diffusion.noise.level import find_holders
from tests.helpers.adapted import nara_config
from tests.helpers.small_pipelines import small_sdxl
from tests.loaders.adapters import State, predict, trained
from tests.strength.models import SCHEDULE
from tests.strength.pipelines import loaded

pytestmark = [
    pytest.mark.filterwarnings("ignore:Already found a `peft_config` attribute"),
    pytest.mark.filterwarnings("ignore:Adapter .* was active which is now deleted"),
]


@pytest.fixture(scope="module")
def conventions(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A NaRA of each definition of λ that a UNet can have."""
    found = {}
    for seed, name in enumerate(("timestep", "flow", "edm"), start=20):
        found[name] = tmp_path_factory.mktemp(name)
        trained(text=False, seed=seed, noise_convention=name).save_nara_weights(found[name])
    return found


def lora_with_schedule(folders: dict[str, Path], pipe: Any = None) -> Any:
    pipe = loaded(folders["LoRA"], "LoRA", pipe)
    pipe.set_adapters("toy", SCHEDULE)
    return pipe


def predict_at(pipe: Any, timesteps: list[float]) -> Tensor:
    torch.manual_seed(3)
    condition = {"text_embeds": torch.randn(2, 24), "time_ids": torch.ones(2, 6)}
    with torch.no_grad():
        inputs = torch.randn(2, 4, 8, 8), torch.tensor(timesteps), torch.randn(2, 5, 40)
        return pipe.unet(*inputs, added_cond_kwargs=condition).sample


AT = {"timestep": ([120, 710], [0.12, 0.71]), "flow": ([120, 710], [0.12, 0.71]), "edm": ([-0.45, 0.2], [0.142, 0.69])}
"""Two timesteps of each definition, and their λ; of edm 1 / (1 + exp −4t)."""


@pytest.mark.parametrize("name", AT)
def test_lora_with_a_schedule_and_a_nara_may_come_in_either_order(name, folders, conventions):
    first = lora_with_schedule(folders)
    loaded(conventions[name], "NaRA", first, "nara")
    second = loaded(conventions[name], "NaRA", None, "nara")
    loaded(folders["LoRA"], "LoRA", second)
    timesteps, levels = AT[name]
    for pipe in (first, second):
        pipe.set_adapters(["nara", "toy"], [0.7, SCHEDULE])
        found = predict_at(pipe, timesteps)
        set_strength(pipe.unet, "toy", None)
        for i, level in enumerate(levels):
            pipe.set_adapters(["nara", "toy"], [0.7, SCHEDULE(level).item()])
            torch.testing.assert_close(found[i], predict_at(pipe, timesteps)[i], rtol=1e-3, atol=1e-3)
    first.set_adapters("toy", SCHEDULE)  # as before
    first.delete_adapters("nara")
    assert torch.equal(predict(first), predict(lora_with_schedule(folders)))


@pytest.mark.parametrize("name", AT)
@pytest.mark.parametrize("other", AT)
def test_what_is_deleted_leaves_no_definition_to_a_lora_with_a_schedule(name, other, folders, conventions):
    pipe = lora_with_schedule(folders, loaded(conventions[name], "NaRA", None, "gone"))
    pipe.delete_adapters("gone")
    assert torch.equal(predict(pipe), predict(lora_with_schedule(folders)))
    reference = lora_with_schedule(folders, loaded(conventions[other], "NaRA", None, "nara"))
    for each in (loaded(conventions[other], "NaRA", pipe, "nara"), reference):
        each.set_adapters(["toy", "nara"], [SCHEDULE, 1.0])
    assert torch.equal(predict_at(pipe, AT[other][0]), predict_at(reference, AT[other][0]))


def test_a_load_that_fails_leaves_a_scheduled_lora_its_definition(folders, conventions, monkeypatch):
    pipe = lora_with_schedule(folders)
    expected = predict(pipe)

    def fail(*args: Any) -> None:
        raise RuntimeError("no memory")

    monkeypatch.setattr(insertion, "warn_where_off", fail)
    with pytest.raises(RuntimeError, match="no memory"):
        loaded(conventions["edm"], "NaRA", pipe, "nara")
    assert torch.equal(predict(pipe), expected)


def test_the_number_of_timesteps_stays_where_the_definition_changes(folders, conventions):
    pipes = [small_sdxl()]
    pipes[0].scheduler = EulerDiscreteScheduler(num_train_timesteps=1600)
    lora_with_schedule(folders, pipes[0])
    pipes[0].unet.add_adapter(nara_config(target_modules=["to_q"], noise_convention="flow"), "nara")
    (holder,) = find_holders(pipes[0].unet)
    assert (holder.source.convention, holder.source.num_train_timesteps) == ("flow", 1600)


def test_a_source_that_was_removed_does_not_return_with_an_adapter(folders, conventions):
    pipe = lora_with_schedule(folders)
    set_noise_source(pipe.unet, None)
    loaded(conventions["flow"], "NaRA", pipe, "nara")
    with pytest.raises(ValueError, match="λ is not known"):
        predict(pipe)
    pipe.delete_adapters("nara")
    pipe.set_adapters("toy", SCHEDULE)
    with pytest.raises(ValueError, match="λ is not known"):
        predict(pipe)


@pytest.mark.parametrize("way", ["delete", "another pipeline"])
def test_two_definitions_in_one_model_are_refused_with_remedies_that_work(way, conventions):
    pipe = loaded(conventions["timestep"], "NaRA", None, "mine")
    before = State(pipe)
    with pytest.raises(
        ValueError,
        match=r"'other' was trained with λ defined as 'flow', but the source of λ tells 'timestep', as 'mine' "
        r"of this model needs.*Remove 'mine' first, pipe.delete_adapters\(\['mine'\]\).*or add 'other' to another ",
    ):
        loaded(conventions["flow"], "NaRA", pipe, "other")
    assert State(pipe) == before
    expected = predict(loaded(conventions["flow"], "NaRA", None, "other"))
    if way == "delete":
        pipe.delete_adapters(["mine"])
    else:
        pipe = small_sdxl()
    assert torch.equal(predict(loaded(conventions["flow"], "NaRA", pipe, "other")), expected)


def test_hotswap_of_the_only_adapter_may_change_the_definition(conventions):
    pipe = loaded(conventions["timestep"], "NaRA", None, "mine")
    pipe.load_nara_weights(conventions["edm"], adapter_name="mine", hotswap=True)
    expected = predict_at(loaded(conventions["edm"], "NaRA"), AT["edm"][0])
    torch.testing.assert_close(predict_at(pipe, AT["edm"][0]), expected, rtol=0, atol=1e-6)
