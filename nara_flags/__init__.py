"""The flags of the train scripts. Nothing here imports a slow library, so mistakes are reported at once.

    options    how a flag is declared; the conversion of its value, and the check of its range
    parser     the command line and the YAML file; --help
    imports    what the train scripts import their libraries in
    hints      flags of other scripts, and what they are called here
    training   the flags that both scripts share
    text       the flags of train_scripts/dllm.py
    images     the flags of train_scripts/dreambooth.py

Checks that need torch, PEFT or a model are in `nara_diffusion`, in classes that inherit from the
flags: `dllm.text_arguments.Arguments` and `dreambooth.image_arguments.DreamBoothArguments`.
"""
