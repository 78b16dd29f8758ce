"""Adapters over a frozen base.

lora: pytrees (init, stack, scale, detach, fold); merge: the QR merge; diagnostics: its figures; peft: files.
"""
