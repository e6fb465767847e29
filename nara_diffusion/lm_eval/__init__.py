"""Published benchmarks for masked-diffusion language models, by lm-evaluation-harness (lm-eval).

    nara-eval --model_args pretrained=GSAI-ML/LLaDA-8B-Instruct,peft=outputs/dllm-1 --tasks
    llm_adapters_math

`__main__` is the command, `harness_model` lm-eval's interface, `harness_text` its texts as token
ids; presets.yaml has the settings of published results, tasks/ the paper's test sets. Needs the
extra `eval`; nothing else imports lm-eval.
"""
