"""Published benchmarks for masked-diffusion language models, by lm-evaluation-harness (lm-eval).

    nara-eval --model_args pretrained=GSAI-ML/LLaDA-8B-Instruct,peft=outputs/dllm-1 --tasks llm_adapters_math

| module                  | what is in it                                                                      |
|-------------------------|------------------------------------------------------------------------------------|
| `command`               | the command: registers the model class, adds this package's tasks, runs lm-eval's  |
| `model`                 | `NaraDLLM`, lm-eval's interface: generation and likelihood, λ told at each forward |
| `loading`               | --model_args → model, tokenizer, adapter                                           |
| `processes`             | one process, or those of accelerate launch                                         |
| `prompts`               | texts → token ids, by the rules that training used                                 |
| `generation`            | gen_kwargs → arguments of `generate`                                               |
| `llm_adapters`          | the paper's fourteen test sets in the form of LLM-Adapters: data and scoring       |
| `code_tasks`            | HumanEval and MBPP: which part of an answer is the program, pass@1                 |
| `execution`, `limited`  | runs a program in a process of its own with limits                                 |
| `paper`, `paper_tables` | the paper's experiments as commands, and their results as tables                   |
| `paper_settings`        | what a run was made with, so that none passes for another's                        |
| `shared`                | files that several machines write                                                  |
| `launching`             | how many processes those run in                                                    |
| `download`              | one file from the web                                                              |
| `tasks/`                | the task files                                                                     |

Needs the extra `eval`. Nothing else in the package imports lm-eval.
"""
