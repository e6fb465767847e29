"""The page in the browser: three samples from one noise, what is left after an error, and the page itself."""

from __future__ import annotations

import asyncio
import urllib.request
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

from nara_diffusion import StrengthSchedule, noise_level
from tests.helpers.tlora_files import SDXL, SETTINGS, repository_file, saved

pytestmark = [pytest.mark.slow, pytest.mark.skipif(find_spec("gradio") is None, reason="needs Gradio")]
CALL: dict[str, Any] = {"seed": 1, "num_inference_steps": 2, "guidance_scale": 2.0}
PROMPT = "a photo of sks toy"


@pytest.fixture
def app() -> Any:
    return import_module("app")


def test_samples_are_base_one_level_and_with_level(app: Any) -> None:
    session, pipe = import_module("app_session").Session(), import_module("app_session").load_pipeline(str(app.MODEL))
    choices = session.load(str(app.MODEL), [str(app.ADAPTER)])

    def sampled(*rows: list[Any]) -> list[bytes]:
        points = app.points_of([*rows], choices)
        return [image.tobytes() for image in session.sample(PROMPT, points, 0.3, lambda *_: None, **CALL)]

    def draw() -> bytes:
        options = {name: value for name, value in CALL.items() if name != "seed"}
        return pipe(PROMPT, generator=torch.Generator().manual_seed(1), **options).images[0].tobytes()

    base, at_one_level, free = sampled([1, 0, 1.0], [1, 1, 0.5])
    assert draw() == base
    pipe.load_nara_weights(str(app.ADAPTER), adapter_name="toy")
    pipe.set_adapters("toy", adapter_weights=StrengthSchedule([(0.0, 1.0), (1.0, 0.5)]))
    assert draw() == free
    with noise_level(pipe.unet, 0.3):
        assert draw() == at_one_level
    assert len({base, at_one_level, free}) == 3
    assert len(set(sampled([1, 0, 0.0], [1, 1, 0.0]))) == 1


def test_error_leaves_no_adapter_and_names_no_file(app: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    session = import_module("app_session").Session()
    choices = session.load(str(app.MODEL), [str(app.ADAPTER)])
    with pytest.raises(ValueError, match=r"Row 1 of the strengths is \[3, 0, 1\], expected adapter \(1 to 1\)"):
        app.points_of([[3, 0, 1]], choices)
    for name in ("first.safetensors", "second.safetensors"):
        (tmp_path / name).write_bytes(b"no tensors")
    handler = app.or_blank(lambda: (session.load(str(app.MODEL), [str(tmp_path)]), "table", "picture"), [[], None])
    line, *outputs = handler()
    assert outputs == [[], None]
    assert (
        line
        == f"**Not done.** '{tmp_path.name}' can't be loaded as an adapter of this pipeline: the terminal says why."
    )
    assert "first.safetensors" in caplog.text
    assert not session._adapters
    assert not getattr(session._pipe.unet, "peft_config", {})
    handler = app.or_blank(lambda: torch.load(tmp_path / "missing"), [None])
    assert handler() == ("**Not done.** FileNotFoundError: the terminal says more.", None)


def test_button_and_errors_come_before_the_frames(app: Any) -> None:
    def order(part: dict[str, Any]) -> list[int]:
        return [part["id"], *(each for child in part.get("children", []) for each in order(child))]

    async def config() -> Any:  # in an event loop, as below
        return app.build().get_config_file()

    page = asyncio.run(config())
    kinds = {part["id"]: (part["type"], part["props"].get("value")) for part in page["components"]}
    order_of_kinds = [kinds[each] for each in order(page["layout"]) if each in kinds]
    button, (first, *_) = (
        order_of_kinds.index(("button", "Sample")),
        (n for n, (kind, _) in enumerate(order_of_kinds) if kind == "image"),
    )
    assert button < first
    assert [kind for kind, _ in order_of_kinds[button:first]].count("markdown") == 1


def test_page_opens_locally_and_names_its_start(app: Any) -> None:
    async def config() -> str:  # in an event loop, since Gradio makes one that it never closes where there is none
        page = app.build()
        _, address, shared = page.launch(server_name="127.0.0.1", share=False, prevent_thread_lock=True, quiet=True)
        content = await asyncio.to_thread(lambda: urllib.request.urlopen(f"{address}config").read().decode())
        page.close()
        assert not shared
        return content

    content = asyncio.run(config())
    assert "sdxl-tiny" in content
    assert "toy-nara" in content


def test_whole_tlora_is_added_a_damaged_one_not(app: Any, tmp_path: Path) -> None:
    session = import_module("app_session")
    pipe = session.load_pipeline(str(app.MODEL))
    tensors = repository_file(pipe.unet, SDXL)
    adapter = session.add(pipe, str(saved(tmp_path / "whole", tensors, SETTINGS)), "whole")
    assert adapter.summary.startswith("NaRA: core rank_mask, rank 4")
    del tensors[next(iter(tensors))]
    with pytest.raises(ValueError, match="also has"):
        session.add(pipe, str(saved(tmp_path / "damaged", tensors, SETTINGS)), "damaged")
