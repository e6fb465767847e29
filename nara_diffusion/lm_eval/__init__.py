"""Run published benchmarks on masked-diffusion language models with lm-evaluation-harness.

    nara-eval --model_args pretrained=GSAI-ML/LLaDA-8B-Instruct,peft=outputs/dllm-1 --tasks
    llm_adapters_math

`__main__` is the command, `harness_model` implements lm-eval's interface, and `harness_text`
converts its texts to token ids. presets.yaml contains the settings of published results, and tasks/
the paper's test sets. This needs the extra `eval`; nothing else imports lm-eval.
"""
