"""Answers: batched generation with a KV cache, each answer made once."""
