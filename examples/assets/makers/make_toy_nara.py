"""Makes assets/toy-nara: the adapter that examples/app.py shows unless another one is named.

    python examples/assets/makers/make_toy_nara.py

It is what 05_load_nara_weights.py trains on the five pictures of assets/subject, in a minute of a CPU, with A and B in
float16; the core stays float32.
"""

from __future__ import annotations

import sys
import tempfile
from importlib import import_module
from pathlib import Path

import torch
from safetensors.torch import save_file

from nara_diffusion.cores.core_set import is_core_key
from nara_diffusion.loaders.tensor_files import WEIGHTS_NAME, read_tensors
from nara_diffusion.utils.files import atomic_write

EXAMPLES = Path(__file__).parents[2]


def main(folder: Path = EXAMPLES / "assets" / "toy-nara", steps: int = 220) -> None:
    sys.path.insert(0, str(EXAMPLES))
    example = import_module("05_load_nara_weights")
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as trained:
        example.train(example.load_pipeline(EXAMPLES / "assets" / "sdxl-tiny"), steps, Path(trained))
        tensors, metadata = read_tensors(Path(trained) / WEIGHTS_NAME)
    halved = {key: tensor if is_core_key(key) else tensor.half() for key, tensor in tensors.items()}
    folder.mkdir(parents=True, exist_ok=True)
    with atomic_write(folder / WEIGHTS_NAME) as partial:
        save_file(halved, str(partial), metadata=metadata)


if __name__ == "__main__":
    main()
