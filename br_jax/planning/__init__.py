"""What a run would need on a TPU pod, asked of the TPU's own compiler on any host; see experiments/fit_check.py."""
