"""Adapters over a frozen base: pytrees (lora), the QR merge, figures and the Buffer's guard, PEFT files."""
