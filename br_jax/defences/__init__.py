"""Other defences of fine-tuning: what Buffer-and-Reinforce is held against. One file each, by name in `registry`."""
