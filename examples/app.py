"""Samples before and after an adapter in the browser, with the adapter's strength as a curve over λ.

    pip install -e '.[app]'                                     # once
    python examples/app.py                                      # the small SDXL and adapter of this project, on a CPU
    python examples/app.py --adapter outputs/dreambooth-1       # yours; --adapter again for another one beside it
    python examples/app.py --model stabilityai/stable-diffusion-xl-base-1.0 --adapter my-toy

A pipeline is a folder or a repository on the Hub, and so is an adapter, which may also be a file: a NaRA, or a LoRA
that Diffusers reads. The table holds points (λ, strength) of each adapter, between which its strength is linear; two
points at one λ are a step. They become `pipe.set_adapters(names, adapter_weights=[StrengthSchedule(…)])`.

As a Space on Hugging Face: examples/space/README.md has the front matter, and says what to copy.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import gradio as gr
from app_session import Adapter, Points, Session, draw_curves

from nara_diffusion import StrengthSchedule

ASSETS = Path(__file__).parent / "assets"
MODEL, ADAPTER = ASSETS / "sdxl-tiny", ASSETS / "toy-nara"
PROMPT = "a photo of sks toy in the snow"
TITLE = "NaRA: before and after"
ABOUT = f"""# {TITLE}
A noise-aware adapter changes with the noise level λ: sampling starts at pure noise, λ = 1, and ends at λ = 0.
Edit the adapter's strength over λ, and see what becomes of the same noise without and with it."""
COLUMNS = ["adapter", "λ", "strength"]
CSS = ".sample img {width: 100%; height: 100%; object-fit: contain}"
"""Small images are shown large; Gradio would leave them as small as they are."""
Row = Sequence[Any]
"""The adapter's number, from 1 on; λ; its strength there. Empty cells are None or an empty text."""


@contextmanager
def in_one_line() -> Iterator[None]:
    """What a user can mend is shown in one line, without a traceback in the page or the terminal."""
    try:
        yield
    except (ValueError, OSError, ImportError, RuntimeError) as error:  # a RuntimeError is torch's, e.g. out of memory
        line = str(error).strip().partition("\n")[0] or type(error).__name__
        raise gr.Error(line, print_exception=False, duration=20) from error


def rows_of(adapters: Sequence[Adapter]) -> list[Row]:
    """The table with the strengths that the adapters bring."""
    return [[number, *point] for number, adapter in enumerate(adapters, start=1) for point in adapter.points]


def with_a_point(rows: Sequence[Row]) -> list[Row]:
    """One row more, half-way from the last one's λ to 0, to be edited."""
    number, level, strength = (1, 1.0, 1.0)
    if rows and all(isinstance(cell, (int, float)) for cell in rows[-1]):
        number, level, strength = rows[-1]
    return [*rows, [number, level / 2, strength]]


def points_of(rows: Sequence[Row], adapters: Sequence[Adapter]) -> list[Points]:
    """The points of each adapter by ascending λ; those that it brings, where the table has none of it.

    Raises:
        ValueError: a row without its numbers, or of an adapter that isn't named; or see `StrengthSchedule`.
    """
    found: list[list[tuple[float, float]]] = [[] for _ in adapters]
    for place, row in enumerate(rows, start=1):
        if any(cell not in (None, "") for cell in row):
            try:
                number, level, strength = map(float, row)
                found[range(1, len(adapters) + 1).index(int(number))].append((level, strength))
            except (TypeError, ValueError):
                expected = f"adapter (1 to {len(adapters)}), λ, strength"
                raise ValueError(f"Row {place} of the strengths is {list(row)}, expected {expected}.") from None
    ordered = [sorted(own, key=lambda point: point[0]) for own in found]
    return [StrengthSchedule(own or adapter.points).points for own, adapter in zip(ordered, adapters, strict=True)]


def build(model: str = str(MODEL), adapters: Sequence[str] = (str(ADAPTER),), prompt: str = PROMPT) -> gr.Blocks:
    """The page, with these values to start from."""
    session = Session()

    def load(model: str, sources: str) -> list[Adapter]:
        return session.load(model.strip(), [line.strip() for line in sources.splitlines() if line.strip()])

    def on_adapters(model: str, sources: str) -> tuple[Any, ...]:
        with in_one_line():
            found = load(model, sources)
            about = "\n".join(f"{number}. `{one.source}`: {one.summary}" for number, one in enumerate(found, start=1))
            return about, rows_of(found), draw_curves(found, [one.points for one in found])

    def on_strengths(model: str, sources: str, rows: list[Row]) -> Any:
        with in_one_line():
            found = load(model, sources)
            return draw_curves(found, points_of(rows, found))

    def on_sample(model, sources, rows, prompt, negative, seed, steps, guidance, progress=gr.Progress()):  # noqa: B008
        with in_one_line():
            call = {"seed": int(seed), "num_inference_steps": int(steps), "guidance_scale": float(guidance)}
            call |= {"negative_prompt": negative} if negative.strip() else {}
            points = points_of(rows, load(model, sources))
            return session.sample(prompt, points, lambda share, what: progress(share, desc=what), **call)

    with gr.Blocks(title=TITLE, analytics_enabled=False) as page:
        gr.Markdown(ABOUT)
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
                columns: dict[str, Any] = {"headers": COLUMNS, "datatype": "number", "column_count": 3, "type": "array"}
                table = gr.Dataframe(label=what, interactive=True, **columns)
                add = gr.Button("Add a point", size="sm")
                about = gr.Markdown()
                button = gr.Button("Sample", variant="primary")
        with gr.Row():
            look: dict[str, Any] = {"interactive": False, "format": "png", "height": 400, "elem_classes": "sample"}
            images = [gr.Image(label=f"{name} adapters", **look) for name in ("before: without", "after: with")]
        curves = gr.Plot(show_label=False)
        named = [pipeline, sources]
        page.load(on_adapters, named, [about, table, curves], api_visibility="private", show_progress="hidden")
        sources.blur(on_adapters, named, [about, table, curves], api_name="adapters", show_progress="hidden")
        table.input(on_strengths, [*named, table], curves, api_name="strengths", show_progress="hidden")
        added = add.click(with_a_point, table, table, api_visibility="private")
        added.then(on_strengths, [*named, table], curves, api_visibility="private", show_progress="hidden")
        given = [*named, table, text, negative, seed, steps, guidance]
        button.click(on_sample, given, images, api_name="sample", show_progress_on=images)
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
