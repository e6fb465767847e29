"""The small language models: questions, tokenizer, objectives, files and cards."""
