"""The other side of `loading`: transformers on PyTorch. Nothing of br_jax is imported here."""

import gc

import torch
from transformers import AutoModelForCausalLM
from transformers.utils import logging


def load(folder):
    """The work: the model in bf16, in the place of the one before; its pages are touched, for they may be mapped."""
    logging.disable_progress_bar()
    held = []

    def unit(index: int):
        held.clear()
        gc.collect()
        network = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
        held.append(network)
        for parameter in network.parameters():
            parameter.detach().view(-1)[::1024].sum()
        return sum(parameter.nbytes for parameter in network.parameters()) / 1e9, None

    return unit
