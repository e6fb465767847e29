"""An adapter in the browser: the base, the adapter held at one λ, and the adapter with λ, from the same noise.

    pip install -e '.[app]'                                     # once
    python examples/app.py                                      # the small SDXL and adapter of this project, on a CPU
    python examples/app.py --adapter outputs/dreambooth-1       # yours; --adapter again for another one beside it
    python examples/app.py --model stabilityai/stable-diffusion-xl-base-1.0 --adapter my-toy

A pipeline is a folder or a repository on the Hub, and so is an adapter, which may also be a file: a NaRA, or a LoRA
that Diffusers reads. The table holds points (λ, strength) of each adapter, between which its strength is linear; two
points at one λ are a step. They become `pipe.set_adapters(names, adapter_weights=[StrengthSchedule(…)])`.

This machine alone can open the page, since who can have it load any file of its user.
"""

from __future__ import annotations

import argparse
import logging
from collections.abc import Callable, Sequence
from functools import wraps
from pathlib import Path
from typing import Any

import gradio as gr
from app_session import PRESETS, Adapter, Points, Session, draw_curves

from nara_diffusion import StrengthSchedule

ASSETS = Path(__file__).parent / "assets"
MODEL, ADAPTER = ASSETS / "sdxl-tiny", ASSETS / "toy-nara"
PROMPT = "a photo of sks toy in the snow"
TITLE = "NaRA: an adapter that knows the noise level"
ABOUT = f"""# {TITLE}
Sampling starts at pure noise, λ = 1, and ends at λ = 0. A NaRA changes with λ; held at one λ it is a plain LoRA. Both
are shown beside the base, from the same noise. Edit the adapter's strength over λ, or take a preset, and sample."""
OWN = "as it comes"
SAMPLES = ("base", "adapter held at the constant λ", "adapter with λ")
COLUMNS = ["adapter", "λ", "strength"]
CSS = ".sample img {width: 100%; height: 100%; object-fit: contain}"
"""Small images are shown large; Gradio would leave them as small as they are."""
Row = Sequence[Any]
"""The adapter's number, from 1 on; λ; its strength there. Empty cells are None or an empty text."""


def or_blank(handler: Callable[..., tuple[Any, ...]], blank: Sequence[Any]) -> Callable[..., tuple[Any, ...]]:
    """`handler`; of an error that a user can mend, its first line is the first output, and `blank` are the others, so
    that nothing of what was there before stays."""

    @wraps(handler)
    def call(*given: Any) -> tuple[Any, ...]:
        try:
            return handler(*given)
        except (ValueError, OSError, ImportError, RuntimeError) as error:  # a RuntimeError is torch's, e.g. no memory
            logging.getLogger(__name__).warning("%s", error)
            is_ours = type(error) is ValueError
            line = str(error).partition("\n")[0] if is_ours else f"{type(error).__name__}: the terminal says more."
            return f"**Not done.** {line}", *blank

    return call


def about(adapters: Sequence[Adapter]) -> str:
    return "\n".join(f"{n}. `{Path(one.source).name}`: {one.summary}" for n, one in enumerate(adapters, start=1))


def rows_of(points: Sequence[Points]) -> list[Row]:
    """The table of these strengths, one for each adapter."""
    return [[number, *point] for number, curve in enumerate(points, start=1) for point in curve]


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
    curves: list[list[tuple[float, float]]] = [[] for _ in adapters]
    for place, row in enumerate(rows, start=1):
        if any(cell not in (None, "") for cell in row):
            try:
                number, level, strength = map(float, row)
                curves[range(1, len(adapters) + 1).index(int(number))].append((level, strength))
            except (TypeError, ValueError):
                expected = f"adapter (1 to {len(adapters)}), λ, strength"
                raise ValueError(f"Row {place} of the strengths is {list(row)}, expected {expected}.") from None
    ordered = [sorted(curve, key=lambda point: point[0]) for curve in curves]
    return [StrengthSchedule(curve or adapter.points).points for curve, adapter in zip(ordered, adapters, strict=True)]


def build(model: str = str(MODEL), adapters: Sequence[str] = (str(ADAPTER),), prompt: str = PROMPT) -> gr.Blocks:
    """The page, with these values to start from."""
    session = Session()

    def load(model: str, sources: str) -> list[Adapter]:
        return session.load(model.strip(), [line.strip() for line in sources.splitlines() if line.strip()])

    def on_adapters(model: str, sources: str, constant: float, loaded_before: Any) -> Any:
        if [model, sources] == loaded_before:  # a field that was left as it was
            return gr.skip()
        loaded_adapters = load(model, sources)
        stored = [one.points for one in loaded_adapters]
        return (
            about(loaded_adapters),
            rows_of(stored),
            draw_curves(loaded_adapters, stored, constant),
            [model, sources],
            OWN,
            None,
            None,
            None,
        )

    def on_preset(model: str, sources: str, constant: float, preset: str) -> tuple[Any, ...]:
        loaded_adapters = load(model, sources)
        points = [PRESETS.get(preset, one.points) for one in loaded_adapters]
        return about(loaded_adapters), rows_of(points), draw_curves(loaded_adapters, points, constant)

    def on_strengths(model: str, sources: str, constant: float, rows: list[Row]) -> tuple[Any, ...]:
        loaded_adapters = load(model, sources)
        return about(loaded_adapters), draw_curves(loaded_adapters, points_of(rows, loaded_adapters), constant)

    def on_sample(
        model,
        sources,
        constant,
        rows,
        prompt,
        negative,
        seed,
        steps,
        guidance,
        progress=gr.Progress(),  # noqa: B008
    ):
        call = {"seed": int(seed), "num_inference_steps": int(steps), "guidance_scale": float(guidance)}
        call |= {"negative_prompt": negative} if negative.strip() else {}
        loaded_adapters = load(model, sources)
        show = lambda share, hint: progress(share, desc=hint)  # noqa: E731
        return about(loaded_adapters), *session.sample(
            prompt, points_of(rows, loaded_adapters), float(constant), show, **call
        )

    with gr.Blocks(title=TITLE, analytics_enabled=False) as page:
        gr.Markdown(ABOUT)
        button = gr.Button("Sample", variant="primary")  # above the images, which fill a narrow page
        state = gr.Markdown()
        with gr.Row():
            look: dict[str, Any] = {"interactive": False, "format": "png", "height": 340, "elem_classes": "sample"}
            images = [gr.Image(label=label, min_width=240, **look) for label in SAMPLES]
        with gr.Row():
            with gr.Column(min_width=320):
                text = gr.Textbox(prompt, label="prompt")
                negative = gr.Textbox("", label="negative prompt")
                with gr.Row():
                    seed = gr.Number(1, label="seed", precision=0, minimum=0, min_width=80)
                    steps = gr.Slider(1, 100, 25, step=1, label="steps", min_width=160)
                guidance = gr.Slider(0, 20, 4.0, step=0.5, label="guidance")
                pipeline = gr.Textbox(model, label="pipeline", info="a folder or a repository")
                hint = "NaRA or LoRA, one a line: a file, a folder or a repository"
                sources = gr.Textbox("\n".join(dict.fromkeys(adapters)), lines=2, label="adapters", info=hint)
            with gr.Column(min_width=320):
                preset = gr.Radio([OWN, *PRESETS], value=OWN, label="strength over λ")
                constant = gr.Slider(0, 1, 0.5, step=0.05, label="constant λ, of the sample in the middle")
                columns: dict[str, Any] = {"headers": COLUMNS, "datatype": "number", "column_count": 3, "type": "array"}
                hint = "points: linear between them; two at one λ are a step"
                table = gr.Dataframe(label=hint, interactive=True, **columns)
                add = gr.Button("Add a point", size="sm")
            with gr.Column(min_width=320):
                curves = gr.Plot(show_label=False)
        source = [pipeline, sources, constant]
        loaded_before = gr.State()
        loaded = [state, table, curves, loaded_before, preset, *images]
        hidden: dict[str, Any] = {"show_progress": "hidden"}
        blank: list[Any] = [[], None, None, OWN, None, None, None]
        on_adapters = or_blank(on_adapters, blank)
        on_strengths = or_blank(on_strengths, [None])
        page.load(on_adapters, [*source, loaded_before], loaded, api_visibility="private", **hidden)
        for box in (pipeline, sources):
            box.change(lambda: blank, None, loaded[1:], api_visibility="private", **hidden)
            box.blur(on_adapters, [*source, loaded_before], loaded, api_visibility="private", **hidden)
        choose = or_blank(on_preset, [[], None])
        preset.input(choose, [*source, preset], [state, table, curves], api_visibility="private", **hidden)
        for changed in (table.input, constant.release):
            changed(on_strengths, [*source, table], [state, curves], api_visibility="private", **hidden)
        added = add.click(with_a_point, table, table, api_visibility="private")
        added.then(on_strengths, [*source, table], [state, curves], api_visibility="private", **hidden)
        components = [*source, table, text, negative, seed, steps, guidance]
        sample = or_blank(on_sample, [None] * 3)
        button.click(sample, components, [state, *images], api_name="sample", show_progress_on=images)
    return page


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(MODEL), help="pipeline: a folder or a repository (default: sdxl-tiny)")
    parser.add_argument("--adapter", action="append", help="a file, a folder or a repository (default: toy-nara)")
    parser.add_argument("--prompt", default=PROMPT, help="to start from (default: %(default)s)")
    parser.add_argument("--port", type=int, help="port to listen at (default: the first free one from 7860 on)")
    args = parser.parse_args(arguments)
    page = build(args.model, args.adapter or [str(ADAPTER)], args.prompt)
    page.launch(server_name="127.0.0.1", server_port=args.port, share=False, css=CSS)


if __name__ == "__main__":
    main()
