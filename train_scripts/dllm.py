"""Fine-tune a masked-diffusion language model (LLaDA, Dream, …). The code is in nara_diffusion/dllm/train.py.

The shipped model and task, offline, on CPU, in minutes:
    accelerate launch train_scripts/dllm.py
LLaDA-8B on all GPUs of the machine (or on N of them with --num_processes N), with global_batch_size samples per step:
    accelerate launch train_scripts/dllm.py --config train_scripts/configs/llada_instruct_math14k.yaml
"""

import sys

from nara_command import TEXT_FLAGS, refuse_typos

if __name__ == "__main__":
    refuse_typos(sys.argv[1:], TEXT_FLAGS)  # before the imports that take seconds

from nara_diffusion.dllm.train import Arguments, __doc__, main, shipped_run
from nara_diffusion.training.command import run_command

if __name__ == "__main__":
    run_command(main, Arguments, __doc__, shipped_run)
