"""Samples before and after an adapter in the browser, with the adapter's strength as a curve over λ.

    pip install -e '.[app]'                                     # once
    python examples/app.py                                      # the small SDXL and adapter of this project, on a CPU
    python examples/app.py --adapter outputs/dreambooth-1       # yours; --adapter again for another one beside it
    python examples/app.py --model stabilityai/stable-diffusion-xl-base-1.0 --adapter my-toy

A pipeline is a folder or a repository on the Hub, and so is an adapter, which may also be a file: a NaRA, or a LoRA
that Diffusers or PEFT reads. The table holds points (λ, strength) of each adapter, between which its strength is
linear; two points at one λ are a step. They become `pipe.set_adapters(names, adapter_weights=[StrengthSchedule(…)])`.

As a Space on Hugging Face: examples/space/README.md has the front matter, and says what to copy.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import gradio as gr
from app_adapters import Adapter, read
from app_curves import draw
from app_sampling import Call, Sampler
from app_table import COLUMNS, Row, points_of, rows_for, with_a_point

ASSETS = Path(__file__).parent / "assets"
MODEL, ADAPTER = ASSETS / "sdxl-tiny", ASSETS / "toy-nara"
PROMPT = "a photo of sks toy in the snow"
TITLE = "NaRA: before and after"
ABOUT = f"""# {TITLE}
A noise-aware adapter changes with the noise level λ: sampling starts at pure noise, λ = 1, and ends at λ = 0.
Edit the adapter's strength over λ, and see what becomes of the same noise without and with it."""
OTHER_TABLE = "Other adapters were named: these are the strengths that they bring. Edit the table, and sample again."
CSS = ".sample img {width: 100%; height: 100%; object-fit: contain}"
"""Small images are shown large; Gradio would leave them as small as they are."""


@contextmanager
def in_one_line() -> Iterator[None]:
    """What a user can mend is shown in one line, without a traceback in the page or the terminal."""
    try:
        yield
    except (ValueError, OSError, ImportError, RuntimeError) as error:  # a RuntimeError is torch's, e.g. out of memory
        line = str(error).strip().partition("\n")[0] or type(error).__name__
        raise gr.Error(line, print_exception=False, duration=20) from error


def read_all(text: str) -> list[Adapter]:
    """The adapters that are named one a line.

    Raises:
        ValueError: see `app_adapters.read`.
    """
    return [read(line.strip()) for line in text.splitlines() if line.strip()]


def describe(adapters: Sequence[Adapter]) -> str:
    return "\n".join(f"{number}. `{one.source}`: {one.summary}" for number, one in enumerate(adapters, start=1))


def on_adapters(text: str, shown: list[Adapter], rows: list[Row]) -> tuple[Any, ...]:
    """Adapters were named: what they are, their table, and the curves."""
    with in_one_line():
        adapters = read_all(text)
        rows = rows_for(adapters, shown, rows)
        return adapters, describe(adapters), rows, draw(adapters, points_of(rows, adapters))


def on_strengths(shown: list[Adapter], rows: list[Row]) -> Any:
    """The table was edited: the curves."""
    with in_one_line():
        return draw(shown, points_of(rows, shown))


def on_sample(sampler: Sampler, call: Call, text: str, shown: list[Adapter], rows: list[Row], progress: Any) -> Any:
    """Images without and with the adapters, and what `on_adapters` shows, of the adapters as they are now."""
    with in_one_line():
        start = time.perf_counter()
        adapters = read_all(text)
        given, rows = list(rows), rows_for(adapters, shown, rows)
        points = points_of(rows, adapters)
        pairs = list(zip(adapters, points, strict=True))
        before, after = sampler.before_and_after(call, pairs, lambda share, what: progress(share, desc=what))
        about = f"{describe(adapters)}\n\nSampled in {time.perf_counter() - start:.1f} s."
        if given and rows != given:
            about += f"\n\n{OTHER_TABLE}"
        return before, after, adapters, about, rows, draw(adapters, points)


def build(model: str = str(MODEL), adapters: Sequence[str] = (str(ADAPTER),), prompt: str = PROMPT) -> gr.Blocks:
    """The page, with these values to start from; an adapter that can't be read is told of there."""
    sampler = Sampler()
    with gr.Blocks(title=TITLE, analytics_enabled=False) as page:
        gr.Markdown(ABOUT)
        shown = gr.State([])
        with gr.Row():
            with gr.Column():
                pipeline = gr.Textbox(model, label="pipeline", info="a folder or a repository")
                what = "NaRA or LoRA, one a line: a file, a folder or a repository"
                sources = gr.Textbox("\n".join(adapters), lines=2, label="adapters", info=what)
                text = gr.Textbox(prompt, label="prompt")
                negative = gr.Textbox("", label="negative prompt")
                with gr.Row():
                    seed = gr.Number(1, label="seed", precision=0, minimum=0)
                    steps = gr.Slider(1, 100, 25, step=1, label="steps")
                    guidance = gr.Slider(0, 20, 4.0, step=0.5, label="guidance")
            with gr.Column():
                what = "strength over λ: linear between points; two points at one λ are a step"
                columns: dict[str, Any] = {
                    "headers": COLUMNS,
                    "datatype": "number",
                    "column_count": len(COLUMNS),
                    "type": "array",
                }
                table = gr.Dataframe(label=what, interactive=True, **columns)
                add = gr.Button("Add a point", size="sm")
                about = gr.Markdown()
                button = gr.Button("Sample", variant="primary")
        with gr.Row():
            look: dict[str, Any] = {"interactive": False, "format": "png", "height": 400, "elem_classes": "sample"}
            before = gr.Image(label="before: without adapters", **look)
            after = gr.Image(label="after: with adapters", **look)
        curves = gr.Plot(show_label=False)

        def sample(model, sources, shown, rows, prompt, negative, seed, steps, guidance, progress=gr.Progress()):  # noqa: B008
            if seed is None:
                raise gr.Error("seed is empty: enter a number.", print_exception=False)
            call = Call(model.strip(), prompt, negative.strip(), int(seed), int(steps), float(guidance))
            return on_sample(sampler, call, sources, shown, rows, progress)

        named, described = [sources, shown, table], [shown, about, table, curves]
        page.load(on_adapters, named, described, api_visibility="private", show_progress="hidden")
        sources.blur(on_adapters, named, described, api_name="adapters", show_progress="hidden")
        table.input(on_strengths, [shown, table], curves, api_name="strengths", show_progress="hidden")
        added = add.click(with_a_point, table, table, api_visibility="private")
        added.then(on_strengths, [shown, table], curves, api_visibility="private", show_progress="hidden")
        inputs = [pipeline, *named, text, negative, seed, steps, guidance]
        images = [before, after]
        button.click(sample, inputs, [*images, *described], api_name="sample", show_progress_on=images)
    return page


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(MODEL), help="pipeline: a folder or a repository (default: sdxl-tiny)")
    parser.add_argument("--adapter", action="append", help="a file, a folder or a repository (default: toy-nara)")
    parser.add_argument("--prompt", default=PROMPT, help="to start from (default: %(default)s)")
    parser.add_argument("--host", help="address to listen at (default: 127.0.0.1, or GRADIO_SERVER_NAME)")
    parser.add_argument("--port", type=int, help="port to listen at (default: the first free one from 7860 on)")
    parser.add_argument("--share", action="store_true", help="a public address, through Gradio's servers")
    args = parser.parse_args(arguments)
    page = build(args.model, args.adapter or [str(ADAPTER)], args.prompt)
    page.launch(server_name=args.host, server_port=args.port, share=args.share or None, css=CSS)


if __name__ == "__main__":
    main()
