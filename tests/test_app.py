"""examples/app.py: through Gradio's client on a server in this process, and in a browser."""

from __future__ import annotations

import asyncio
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import app
import app_adapters
import app_sampling
import app_table
import pytest
import torch
from diffusers import DDIMScheduler, StableDiffusion3Pipeline
from gradio_client import Client
from gradio_client.exceptions import AppError
from huggingface_hub.utils import filter_repo_objects
from PIL import Image

from nara_diffusion import StrengthSchedule, core_matrix, set_strength
from tests.helpers.adapted import lora_config
from tests.helpers.browser import CHROMIUM, opened
from tests.helpers.patience import wait_until
from tests.helpers.small_pipelines import small_sdxl
from tests.loaders.adapters import save_lora, shake, trained

pytestmark = [
    # Gradio 6.31 with pandas 3.1, in its queue's statistics
    pytest.mark.filterwarnings("ignore:'future.no_silent_downcasting' is deprecated"),
    pytest.mark.filterwarnings("ignore:The copy keyword is deprecated"),
]

EXAMPLES = Path(app.__file__).parent
PROMPT = "a photo of toy"
POINTS = [(0.0, 0.3), (0.6, 0.3), (0.6, 1.4)]
SETTINGS = (PROMPT, "", 3, 2, 4.0)  # prompt, negative prompt, seed, steps, guidance


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("app")
    found = {name: root / name for name in ("model", "nara", "scheduled", "text", "lora", "peft", "foreign")}
    small_sdxl().save_pretrained(str(found["model"]))
    trained(text=False).save_nara_weights(found["nara"])
    trained(text=False, seed=2, strength=[[0, 0.2], [1, 0.9]]).save_nara_weights(found["scheduled"])
    trained(seed=3).save_nara_weights(found["text"])
    save_lora(found["lora"])
    save_peft_lora(found["peft"])
    trained(small_sdxl(block_out_channels=(16, 24)), text=False).save_nara_weights(found["foreign"])
    return found


def save_peft_lora(folder: Path) -> None:
    from peft import get_peft_model

    model = get_peft_model(small_sdxl().unet, lora_config(target_modules=["to_k", "to_out.0"], lora_alpha=3))
    shake(model, 6)
    model.save_pretrained(str(folder))


@contextmanager
def serving(**options: Any) -> Iterator[str]:
    """The address of a server of the page on a free port."""

    async def started() -> Any:
        # inside a running event loop, since Gradio makes some that it never closes where there is none
        page = app.build(**options)
        page.launch(prevent_thread_lock=True, quiet=True, server_name="127.0.0.1", css=app.CSS)
        return page

    page = asyncio.run(started())
    try:
        yield page.local_url
    finally:
        page.close()


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    with serving(adapters=[]) as address:
        yield address


@pytest.fixture(scope="module")
def connection(url: str) -> Iterator[Client]:
    client = Client(url, verbose=False)
    yield client
    client.close()
    for pool in (client.executor, client.helper_executor, client.stream_executor):  # which close() leaves
        pool.shutdown()


@pytest.fixture
def client(connection: Client) -> Client:
    """As in a page that has just been opened."""
    connection.reset_session()
    return connection


def table(rows: list[list[Any]]) -> dict[str, Any]:
    return {"headers": app_table.COLUMNS, "data": rows, "metadata": None}


def sampled(client: Client, folders: dict[str, Path], sources: list[Any], rows: list[list[Any]], *settings: Any) -> Any:
    """(image before, image after, text, rows) by the page."""
    text = "\n".join(map(str, sources))
    answer = client.predict(str(folders["model"]), text, table(rows), *(settings or SETTINGS), api_name="/sample")
    before, after = (Image.open(file).convert("RGB").tobytes() for file in answer[:2])
    return before, after, answer[2], answer[3]["data"]


def by_hand(folders: dict[str, Path], prepare: Any = None) -> bytes:
    """The image of a pipeline that `prepare` has loaded adapters into."""
    pipe: Any = small_sdxl()
    if prepare is not None:
        prepare(pipe)
    prompt, _, seed, steps, guidance = SETTINGS
    generator = torch.Generator().manual_seed(seed)
    call = {"num_inference_steps": steps, "guidance_scale": guidance}
    return pipe(prompt, generator=generator, **call).images[0].convert("RGB").tobytes()


def test_sample_gives_the_images_of_diffusers_calls(client, folders):
    def prepare(pipe):
        pipe.load_nara_weights(folders["nara"], adapter_name="one")
        pipe.load_nara_weights(folders["scheduled"], adapter_name="two")
        set_strength(pipe.unet, "two", None)  # what it brings: the table has the whole strength
        pipe.set_adapters(["one", "two"], adapter_weights=[StrengthSchedule(POINTS), 0.7])

    rows = [[1, *point] for point in POINTS] + [[2, 0, 0.7]]
    before, after, text, shown = sampled(client, folders, [folders["nara"], folders["scheduled"]], rows)
    assert before == by_hand(folders)
    assert after == by_hand(folders, prepare)
    assert after != before
    assert shown == rows
    assert f"1. `{folders['nara']}`: NaRA: core hypernetwork, rank 4, " in text
    assert "Sampled in" in text


def test_strength_that_an_adapter_brings_holds_where_the_table_says_nothing(client, folders):
    def prepare(pipe):
        pipe.load_nara_weights(folders["scheduled"], adapter_name="x")

    _, after, _, shown = sampled(client, folders, [folders["scheduled"]], [])
    assert after == by_hand(folders, prepare)
    assert shown == [[1, 0, pytest.approx(0.2)], [1, 1, pytest.approx(0.9)]]


@pytest.mark.parametrize("kind", ["lora", "peft"])
def test_lora_has_its_own_image_and_a_core_that_is_the_identity(client, folders, kind):
    def prepare(pipe):
        if kind == "lora":
            pipe.load_lora_weights(folders["lora"], adapter_name="x")
        else:
            pipe.unet.load_lora_adapter(prefixed(folders["peft"]), prefix=None, adapter_name="x")
        pipe.set_adapters("x", adapter_weights=StrengthSchedule(POINTS))

    _, after, text, _ = sampled(client, folders, [folders[kind]], [[1, *point] for point in POINTS])
    assert "LoRA: C(λ) = I" in text
    assert after != by_hand(folders)
    assert close(after, by_hand(folders, prepare))
    assert set(app_adapters.read(str(folders[kind])).distance) == {0.0}


def test_lora_that_converts_brings_its_scheduler_for_its_image_alone(client, folders, tmp_path):
    v = DDIMScheduler(prediction_type="v_prediction", timestep_spacing="trailing", rescale_betas_zero_snr=True)
    shutil.copytree(folders["lora"], tmp_path / "v")
    v.save_pretrained(str(tmp_path / "v" / "scheduler"))

    def prepare(pipe):
        pipe.load_lora_weights(folders["lora"])
        pipe.scheduler = v

    _, plain, _, _ = sampled(client, folders, [folders["lora"]], [])
    before, after, _, _ = sampled(client, folders, [tmp_path / "v"], [])
    assert before == by_hand(folders)
    assert close(after, by_hand(folders, prepare))
    assert not close(after, plain)
    assert sampled(client, folders, [folders["lora"]], [])[:2] == (before, plain)


def test_download_has_what_a_run_of_the_train_script_loads_from():
    there = [
        "adapter_config.json",
        "adapter_model.safetensors",
        "pytorch_lora_weights.safetensors",
        "scheduler/scheduler_config.json",
    ]
    others = ["README.md", "checkpoint-2/adapter_config.json", "checkpoint-2/adapter_model.safetensors", "a/0.png"]
    assert list(filter_repo_objects([*there, *others], **app_adapters.FILES)) == there


def prefixed(folder: Path) -> Any:
    from peft import load_peft_weights

    tensors = load_peft_weights(str(folder), device="cpu")
    names = {key.removeprefix("base_model.model."): tensor for key, tensor in tensors.items()}
    # by Diffusers, α of a file without metadata is r; the folder's is 3, of r = 4
    return {key: tensor * (3 / 4 if "lora_B" in key else 1) for key, tensor in names.items()}


def close(one: bytes, other: bytes) -> bool:
    """8-bit images of the same sums in another order."""
    difference = [abs(a - b) for a, b in zip(one, other, strict=True)]
    return max(difference) <= 1


def test_text_encoders_have_strength_one_beside_a_schedule(client, folders):
    def prepare(pipe):
        pipe.load_nara_weights(folders["text"], adapter_name="x")
        weights = {"unet": StrengthSchedule(POINTS), "text_encoder": 1.0, "text_encoder_2": 1.0}
        pipe.set_adapters("x", adapter_weights=weights)

    _, after, _, _ = sampled(client, folders, [folders["text"]], [[1, *point] for point in POINTS])
    assert after == by_hand(folders, prepare)


def test_one_number_for_all_levels_holds_for_text_encoders_too(client, folders):
    def prepare(pipe):
        pipe.load_nara_weights(folders["text"], adapter_name="x")
        pipe.set_adapters("x", adapter_weights=0.4)

    _, after, _, _ = sampled(client, folders, [folders["text"]], [[1, 0, 0.4], [1, 1, 0.4]])
    assert after == by_hand(folders, prepare)


def test_naming_adapters_shows_their_strengths_and_keeps_a_table_of_the_same_ones(client, folders):
    one, two = str(folders["nara"]), str(folders["scheduled"])
    text, shown, plot = client.predict(one, table([]), api_name="/adapters")
    assert shown["data"] == [[1, 0, 1], [1, 1, 1]]
    assert plot["type"] == "matplotlib"
    edited = [[1, 0, 0.5], [1, 1, 0.1]]
    assert client.predict(one, table(edited), api_name="/adapters")[1]["data"] == edited
    text, shown, _ = client.predict(f"{one}\n\n {two} ", table(edited), api_name="/adapters")
    assert shown["data"][:2] == [[1, 0, 1], [1, 1, 1]]
    assert [row[0] for row in shown["data"]] == [1, 1, 2, 2]
    assert len(text.splitlines()) == 2


def test_sampling_other_adapters_than_the_tables_says_that_it_starts_afresh(client, folders):
    edited = [[1, 0, 0.5], [1, 1, 0.1]]
    _, after, text, shown = sampled(client, folders, [folders["scheduled"]], edited)
    assert shown == edited
    assert app.OTHER_TABLE not in text
    _, after, text, shown = sampled(client, folders, [folders["nara"]], edited)
    assert after == by_hand(folders, lambda pipe: pipe.load_nara_weights(folders["nara"]))
    assert shown == [[1, 0, 1], [1, 1, 1]]
    assert app.OTHER_TABLE in text
    assert app.OTHER_TABLE not in sampled(client, folders, [folders["nara"]], edited)[2]


def test_an_emptied_seed_is_named(client, folders, capfd):
    with pytest.raises(AppError, match=r"seed is empty: enter a number"):
        sampled(client, folders, [folders["nara"]], [], PROMPT, "", None, 2, 4.0)
    assert "Traceback" not in capfd.readouterr().err


def test_editing_the_table_draws_its_curve(client, folders):
    client.predict(str(folders["nara"]), table([]), api_name="/adapters")
    flat = client.predict(table([[1, 0, 1], [1, 1, 1]]), api_name="/strengths")
    falling = client.predict(table([[1, 0, 1], [1, 1, 0.2]]), api_name="/strengths")
    assert flat["plot"] != falling["plot"]


@pytest.mark.parametrize(
    ("sources", "rows", "message"),
    [
        (["nowhere/at/all"], [], "There is no file or folder 'nowhere/at/all', and no repository can have that name"),
        (["me/my-toy"], [], "There is no file or folder 'me/my-toy', and no repository of that name was reached"),
        (["model"], [], "There is no 'pytorch_nara_weights.safetensors' in"),
        (["nara", "foreign"], [], "The adapter in '.*foreign' is refused"),
        ([], [], "No adapter is named"),
        (["nara"], [[1, 0, "a lot"]], r"Row 1 of the strengths is .* expected numbers: adapter, λ, strength"),
        (["nara"], [[1, 0, 1], [2, 0, 1]], "Row 2 of the strengths is of adapter 2, of 1 to 1"),
        (["nara"], [[1, 1.5, 1]], "whose λ is 1.5: λ lies in"),
    ],
)
def test_what_a_user_can_mend_is_told_in_one_line(client, folders, capfd, sources, rows, message):
    with pytest.raises(AppError) as caught:
        sampled(client, folders, [folders.get(source, source) for source in sources], rows)
    assert re.search(message, str(caught.value))
    assert "\n" not in str(caught.value)
    assert "Traceback" not in capfd.readouterr().err


def test_pipeline_keeps_nothing_of_a_refused_adapter(folders):
    sampler, call = app_sampling.Sampler(), app_sampling.Call(str(folders["model"]), PROMPT, steps=1)
    good, bad = (app_adapters.read(str(folders[name])) for name in ("nara", "foreign"))
    pairs = [(good, good.points), (bad, bad.points)]
    with pytest.raises(ValueError, match="is refused"):
        sampler.before_and_after(call, pairs)
    images = [image.tobytes() for image in sampler.before_and_after(call, pairs[:1])]
    fresh = [image.tobytes() for image in app_sampling.Sampler().before_and_after(call, pairs[:1])]
    assert images == fresh


def test_unknown_pipeline_is_told_in_one_line(client, folders):
    with pytest.raises(AppError, match="nowhere") as caught:
        sampled(client, {"model": Path("nowhere/at-all")}, [folders["nara"]], [])
    assert "\n" not in str(caught.value)


def test_pipeline_that_no_repository_can_be_is_told(client, folders):
    with pytest.raises(AppError, match=r"There is no file or folder '/nowhere', and no repository can have that name"):
        sampled(client, {"model": Path("/nowhere")}, [folders["nara"]], [])


def test_pipeline_without_an_optional_model_is_loaded():
    """As the model card says: `from_pretrained(…, text_encoder_3=None, tokenizer_3=None)`."""
    pipe = app_sampling.load_pipeline(str(app.ASSETS / "sd-tiny-flow"))
    assert type(pipe).__name__ == "StableDiffusion3Pipeline"
    assert pipe.text_encoder_3 is None
    call = app_sampling.Call("", "a photo of a red car", seed=3, steps=1)
    image = app_sampling._sample(pipe, call, lambda share, what: None, "")
    stock = StableDiffusion3Pipeline.from_pretrained(app.ASSETS / "sd-tiny-flow", text_encoder_3=None, tokenizer_3=None)
    generator = torch.Generator().manual_seed(3)
    expected = stock(call.prompt, num_inference_steps=1, guidance_scale=4.0, generator=generator).images[0]
    assert image.tobytes() == expected.tobytes()


def test_distance_is_that_of_the_core(folders):
    pipe = small_sdxl()
    pipe.load_nara_weights(folders["nara"], adapter_name="x")
    with torch.no_grad():
        C = core_matrix(pipe.unet, app_adapters.LEVELS, "x").double()  # (n, r, r)
    expected = [((one - torch.eye(4)).norm() / 2).item() for one in C]
    assert app_adapters.read(str(folders["nara"])).distance == pytest.approx(expected, rel=1e-5)


def test_base_image_is_sampled_once_for_a_call(folders):
    said: list[str] = []
    sampler = app_sampling.Sampler()
    adapter = app_adapters.read(str(folders["nara"]))
    call = app_sampling.Call(str(folders["model"]), PROMPT, steps=2)
    for points in ([(0.0, 1.0)], [(0.0, 0.2)]):
        sampler.before_and_after(call, [(adapter, points)], lambda share, what: said.append(what))
    assert said == ["loading the pipeline", *["with adapters"] * 2, *["without adapters"] * 2, *["with adapters"] * 2]


def test_rows_in_any_order_become_points_by_ascending_level(folders):
    adapter = app_adapters.read(str(folders["nara"]))
    rows = [[1, 0.5, 0.9], [None, None, None], [1, 0.5, 0.1], ["1", "0", "1"]]
    assert app_table.points_of(rows, [adapter]) == [((0.0, 1.0), (0.5, 0.9), (0.5, 0.1))]


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")
def test_browser_shows_the_page_and_samples(tmp_path):
    with serving() as address, opened(address, tmp_path / "profile") as page:
        wait_until(lambda: "core hypernetwork, rank 8" in page.text())
        page.evaluate("[...document.querySelectorAll('button')].find(b => b.innerText == 'Sample').click()")
        wait_until(lambda: "Sampled in" in page.text())
        widths = "[...document.querySelectorAll('.sample img')].map(image => image.naturalWidth)"
        wait_until(lambda: page.evaluate(widths) == [64, 64])
        page.picture(tmp_path / "page.png")
    with Image.open(tmp_path / "page.png") as image:
        assert len(image.convert("RGB").getcolors(1 << 24) or ()) > 1000
