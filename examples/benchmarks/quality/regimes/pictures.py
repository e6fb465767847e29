"""Pictures of a confirmed cell: the loss over λ by method, and what the converted models draw."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from matplotlib.figure import Figure
from PIL import Image, ImageDraw, ImageFont

from nara_diffusion.utils.atomic_write import atomic_write
from quality.images.held_out import bin_centres
from quality.images.methods import BASE
from quality.regimes.fronts import points_of, write_front
from quality.regimes.images.conversion import Conversion
from quality.regimes.images.data import SUBJECT
from quality.regimes.images.samples import drawn
from quality.regimes.images.windowed import Windowed
from quality.regimes.plan import Planned
from quality.regimes.rates import Record, chosen_rates
from quality.regimes.report import Confirmed, confirmed
from quality.regimes.runs import REGIMES, Run, train
from quality.report.figures import AXIS, COLOURS, save

TITLES = {
    "lora": "LoRA",
    "lora_params": "LoRA, NaRA's parameters",
    "dora": "DoRA",
    "nara": "NaRA",
    "nara_constant": "NaRA told λ = 0.5",
}
ROWS = {
    BASE: "base, not converted",
    "lora": "LoRA",
    "lora_params": "LoRA, as many parameters",
    "nara": "NaRA",
    "full": "all weights",
}
LABEL, GAP, SCALE = 170, 4, 2  # pixels; samples are enlarged so many times


def write_pictures(plan: Sequence[Planned], records: Sequence[Record], folder: Path) -> list[Path]:
    """For each cell whose confirmation is whole {name}-loss.png; of a conversion's first seed {name}-samples.png, of a
    windowed regime's {name}-front.png and {name}-front.csv.

    Samples and fronts are of models that are trained here again, a minute for each conversion, ten for each window.
    """
    written = []
    for cell in (confirmed(planned, records) for planned in plan if not planned.label):
        if cell.is_whole:
            written.append(folder / f"{cell.planned.name}-loss.png")
            _loss(cell, written[-1])
            regime, seed = REGIMES[cell.planned.cell.regime], min(seed for _, seed in cell.records)
            if isinstance(regime, Conversion):
                written.append(folder / f"{cell.planned.name}-samples.png")
                _samples(cell, records, written[-1])
            elif isinstance(regime, Windowed):
                written += [folder / f"{cell.planned.name}-front.{kind}" for kind in ("png", "csv")]
                write_front(list(points_of(cell.planned, records, seed)), *written[-2:])
    return written


def _loss(cell: Confirmed, path: Path) -> None:
    """Left the mean loss over the seeds; right its difference to LoRA's in percent, with 95 % intervals."""
    figure = Figure(figsize=(9.6, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    of_lora = _means(cell, "lora")
    for colour, arm in zip(COLOURS, [arm for arm in TITLES if arm in cell.arms], strict=False):
        left.plot(bin_centres(), _means(cell, arm), label=TITLES[arm], color=colour, linewidth=1.4)
        found = [each for each in cell.bins(arm, "lora") if each is not None]
        if arm == "lora" or len(found) < len(of_lora):
            continue
        parts = [
            [100 * getattr(each, name) / loss for each, loss in zip(found, of_lora, strict=True)]
            for name in ("mean", "low", "high")
        ]
        right.plot(bin_centres(), parts[0], color=colour, linewidth=1.4)
        right.fill_between(bin_centres(), parts[1], parts[2], color=colour, alpha=0.2, linewidth=0)
    right.axhline(0, color="black", linewidth=0.6)
    left.set(xlabel=AXIS, ylabel="held-out loss")
    right.set(xlabel=AXIS, ylabel="loss − LoRA's, % of LoRA's")
    figure.legend(*left.get_legend_handles_labels(), loc="outside lower center", ncols=5, frameon=False)
    save(figure, path)


def _means(cell: Confirmed, arm: str) -> list[float]:
    losses = [record["losses"] for (name, _), record in cell.records.items() if name == arm and record["losses"]]
    return [sum(of_bin) / len(losses) for of_bin in zip(*losses, strict=True)]


def _samples(cell: Confirmed, records: Sequence[Record], path: Path) -> None:
    """A row a method, a column a place, all from the same noise."""
    planned, seed = cell.planned, min(seed for _, seed in cell.records)
    rows = {ROWS[arm]: _drawn(planned, records, arm, seed) for arm in ROWS if arm in planned.arms}
    side = SCALE * next(iter(rows.values()))[0].width
    width = LABEL + max(len(images) for images in rows.values()) * (side + GAP)
    sheet = Image.new("RGB", (width, len(rows) * (side + GAP)), "white")
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(13)
    for row, (title, images) in enumerate(rows.items()):
        top = row * (side + GAP)
        pen.text((4, top + side // 2 - 8), title, fill="black", font=font)
        for column, image in enumerate(images):
            sheet.paste(image.resize((side, side), Image.Resampling.NEAREST), (LABEL + column * (side + GAP), top))
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as partial:
        sheet.quantize(256).save(partial, optimize=True)  # a third of the bytes


def _drawn(planned: Planned, records: Sequence[Record], arm: str, seed: int) -> list[Image.Image]:
    regime = REGIMES[planned.cell.regime]
    assert isinstance(regime, Conversion)
    model = train(Run(planned.cell, arm, seed, chosen_rates(records, planned, arm))).model
    objective = "eps" if arm == BASE else regime.objective_name
    return drawn(regime.load().pipe, model, objective, SUBJECT, seed)
