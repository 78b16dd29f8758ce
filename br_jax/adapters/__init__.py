"""Adapters over a frozen base.

lora: pytrees (init, stack, scale, detach, fold); merge: the QR merge; diagnostics: its figures, and a lower rank;
similarity: what is in an adapter, and the Buffer's guard; peft: files; peft_config: what PEFT's config says of them.
"""
