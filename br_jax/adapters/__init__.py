"""Adapters over a frozen base.

lora: pytrees (init, stack, scale, detach, fold); merge: the QR merge; diagnostics: its figures; compress: a lower rank;
peft: files; peft_config: what PEFT's config says of them.
"""
