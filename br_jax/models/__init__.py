"""The Flax LLM: one decoder for every model family, its specs, weights and tokenizers.

Axis letters used throughout br_jax: B batch, T tokens, S keys (cache slots), D embed, N query heads,
K key-value heads, G query heads a key-value head, H head dim, F ffw, V vocab, R rank, L layers.
"""
