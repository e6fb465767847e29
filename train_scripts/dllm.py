"""Fine-tune a masked-diffusion language model (LLaDA, Dream, …). The code is in nara_diffusion/dllm/train.py.

The shipped model and task, offline, on CPU, in minutes:
    accelerate launch train_scripts/dllm.py
LLaDA-8B on all GPUs of the machine (or on N of them with --num_processes N), with global_batch_size samples per step:
    accelerate launch train_scripts/dllm.py --config train_scripts/configs/llada_instruct_math14k.yaml
"""

from nara_flags.imports import lasting_imports
from nara_flags.parser import read_flags
from nara_flags.text import TextFlags

if __name__ == "__main__":
    flags = read_flags(TextFlags)

    # these imports take seconds, so help and mistakes come first
    with lasting_imports():
        from nara_diffusion.dllm.train import Arguments, main, shipped_run
        from nara_diffusion.training.command import run_command

    run_command(main, Arguments, flags, shipped_run)
