"""Published benchmarks for masked-diffusion language models, by lm-evaluation-harness (lm-eval).

    nara-eval --model_args pretrained=GSAI-ML/LLaDA-8B-Instruct,peft=outputs/dllm-1 --tasks llm_adapters_math

| module                  | what is in it                                                                      |
|-------------------------|------------------------------------------------------------------------------------|
| `command`               | the command: registers the model class and this package's tasks, then runs lm-eval |
| `model`                 | `NaraDLLM`, lm-eval's interface: generation and likelihood, λ set at each forward  |
| `loading`               | --model_args → model, tokenizer, adapter                                           |
| `processes`             | one process, or those of accelerate launch                                         |
| `prompts`               | texts → token ids, as in training                                                  |
| `generation`            | gen_kwargs → arguments of `generate`                                               |
| `download`              | download of a file                                                                 |
| `tasks/`                | the task files and their scoring: `llm_adapters`, `code`; `execution` runs programs|

Needs the extra `eval`. Nothing else in the package imports lm-eval.
"""
