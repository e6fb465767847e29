"""Published benchmarks for masked-diffusion language models, by lm-evaluation-harness (lm-eval).

    nara-eval --model_args pretrained=GSAI-ML/LLaDA-8B-Instruct,peft=outputs/dllm-1 --tasks llm_adapters_math

| module         | what is in it                                                                      |
|----------------|------------------------------------------------------------------------------------|
| `__main__`     | the command: registers the model class and this package's tasks, then runs lm-eval |
| `harness_model`| `NaraDLLM`, lm-eval's interface: generation and likelihood, λ set at each forward  |
| `harness_text` | texts → token ids, as in training; gen_kwargs → arguments of `generate`            |
| `load_model`   | --model_args → model, tokenizer, adapter                                           |
| `tasks/`       | the task files and their scoring; `execution` runs programs                        |

Needs the extra `eval`. Nothing else in the package imports lm-eval.
"""
