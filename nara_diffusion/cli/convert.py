"""Conversion of a NaRA between its two file formats, tensor by tensor, without the base model.

    nara convert my-toy folder --to peft                            # from save_nara_weights to PeftModel
    nara convert my-toy folder --to peft --component text_encoder   # the same, one of several components
    nara convert folder my-toy --to pipeline --component unet       # from PEFT to pipe.load_nara_weights

To plain LoRAs: nara fold. From a LoRA to a NaRA: nara_diffusion.from_lora, or --init_adapter of the train scripts.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from nara_diffusion.export.adapter_factors import adapter_of_part
from nara_diffusion.loaders.file import MODEL, WEIGHTS_NAME, AdapterFile, naming
from nara_diffusion.loaders.insertion import check_storable

FORMS = ("peft", "pipeline")


def convert(source: str, output: Path, form: str, component: str | None) -> None:
    """Read an adapter, check its tensors, and write it in the other format.

    Raises:
        ValueError: the file is damaged, or already in that format; there is no such component, or there are several and
            `component` is None; a pipeline couldn't load the adapter; `output` is a file.
    """
    if output.is_file():
        raise ValueError(f"OUTPUT {output} is a file: name a folder.")
    parts = AdapterFile.read(Path(source)).parts
    if (form == "peft") == (list(parts) == [MODEL]):
        other = next(each for each in FORMS if each != form)
        raise ValueError(f"'{source}' is in the form {form!r} already: choose --to {other}, or use it as it is.")
    if form == "pipeline":
        if not (component or "").isidentifier():
            raise ValueError("--to pipeline needs --component, the part that is adapted, such as unet or transformer.")
        parts = {str(component): parts[MODEL]}
        check_storable(parts[str(component)].config, str(component))
    elif component not in parts and (component is not None or len(parts) > 1):
        raise ValueError(f"the file has {', '.join(parts)}: choose one of these by --component.")
    chosen = component or next(iter(parts))
    with naming(source):
        adapter_of_part(parts[chosen])  # raises if it is damaged
    file = AdapterFile({chosen: parts[chosen]})
    if form == "peft":
        file.save_peft(output)
    else:
        output.mkdir(parents=True, exist_ok=True)
        file.save(output / WEIGHTS_NAME)


def run(args: Any) -> str:
    """The command `nara convert`."""
    convert(args.file, args.output, args.to, args.component)
    return f"{args.output}: as {args.to}"
