"""Models in and out: GGUF, Hugging Face folders, the Hub; weights and tokenizers."""
