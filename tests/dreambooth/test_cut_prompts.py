"""Prompts that CLIP's tokenizers cut are warned of once each, with their origin."""

import json
import logging

import pytest

from nara_diffusion.dreambooth.cut_prompts import prompt_sources, warn_of_cut_prompts
from nara_diffusion.dreambooth.image_arguments import DreamBoothArguments
from nara_diffusion.dreambooth.image_records import records_from_folder
from tests.dreambooth.pictures import folder_of
from tests.helpers.small_pipelines import MAX_TOKENS, small_sdxl

SHORT = "z" * (MAX_TOKENS - 2)  # a token a letter, between the start and the end


def long(ending: str) -> str:
    return f"{SHORT} {ending}"


@pytest.fixture
def pipe():
    pipe = small_sdxl()
    diffusers = logging.getLogger(type(pipe).__module__)
    filters = list(diffusers.filters)
    yield pipe
    diffusers.filters[:] = filters


def arguments(**changes) -> DreamBoothArguments:
    return DreamBoothArguments(pretrained_model_name_or_path="none", **changes)


def warned(pipe, sources, caplog) -> list[str]:
    """The warnings of a run that encodes each prompt twice, of this package and of Diffusers."""
    diffusers, of_diffusers = logging.getLogger(type(pipe).__module__), []
    handler = logging.Handler()
    handler.emit = lambda record: of_diffusers.append(record.getMessage())
    diffusers.addHandler(handler)
    caplog.clear()
    try:
        warn_of_cut_prompts(pipe, sources)
        for prompt in [*sources] * 2:
            pipe.encode_prompt(prompt)
        diffusers.warning("another message")
    finally:
        diffusers.removeHandler(handler)
    assert of_diffusers == ["another message"]
    return [record.getMessage() for record in caplog.records if record.name.startswith("nara_diffusion")]


def message(source: str, rest: str) -> str:
    start = f"the prompt from {source} is too long: "
    return f"{start}CLIP reads its first {MAX_TOKENS} tokens and ignores {rest!r}. Shorten it."


def test_each_cut_prompt_warns_once_with_its_image(pipe, tmp_path, caplog) -> None:
    folder = folder_of(tmp_path, [(20, 24)] * 4)
    texts = [SHORT, long("ab"), long("ab"), long("c")]
    rows = [json.dumps({"file_name": f"{n:02d}.png", "text": text}) for n, text in enumerate(texts)]
    (folder / "metadata.jsonl").write_text("\n".join([rows[0], "", *rows[1:]]))
    args = arguments(instance_data_dir=str(folder), validation_prompts=[long("d"), long("c")])
    sources = prompt_sources(args, records_from_folder(folder))
    assert warned(pipe, sources, caplog) == [
        message(f"the caption of {folder}/01.png", "ab"),
        message(f"the caption of {folder}/03.png", "c"),
        message("--validation_prompts", "d"),
    ]


def test_prompts_of_text_files_and_arguments_are_named(pipe, tmp_path, caplog) -> None:
    folder, file = folder_of(tmp_path / "images", [(20, 24)] * 2), tmp_path / "prompts.txt"
    (folder / "01.txt").write_text(long("a"))
    args = arguments(instance_data_dir=str(folder), instance_prompt=long("b"))
    sources = prompt_sources(args, records_from_folder(folder, prompt=long("b")))
    file.write_text(f"{SHORT}\n\n{long('c')}\n")
    sources |= prompt_sources(arguments(distill_to=2, prompts_file=str(file)))
    expected = {f"the caption of {folder}/01.png": "a", "--instance_prompt": "b", f"{file}, line 3": "c"}
    assert sorted(warned(pipe, sources, caplog)) == sorted(message(*item) for item in expected.items())
