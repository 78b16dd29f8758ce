"""The other side of `generation`: transformers' `generate`. Nothing of br_jax is imported here."""

import numpy as np
import torch
from transformers import AutoModelForCausalLM
from transformers.utils import logging

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def answer(model, prompts, new, threads, dtype, precision):
    """The work: all prompts in one batch; its outcome the token ids, and how far the two likeliest were apart.

    bf16 products of an f32 model are autocast's.
    """
    logging.disable_progress_bar()
    torch.set_num_threads(threads)
    network = AutoModelForCausalLM.from_pretrained(model, dtype=getattr(torch, dtype), attn_implementation="sdpa")
    network = network.to(DEVICE).eval()
    network.generation_config.eos_token_id = None
    width = max(map(len, prompts))
    tokens = torch.zeros((len(prompts), width), dtype=torch.long)
    mask = torch.zeros_like(tokens)
    for i, ids in enumerate(prompts):
        tokens[i, width - len(ids) :], mask[i, width - len(ids) :] = torch.tensor(ids), 1
    batch = {"input_ids": tokens.to(DEVICE), "attention_mask": mask.to(DEVICE)}

    @torch.inference_mode()
    def unit(index: int):
        with torch.autocast(DEVICE, torch.bfloat16, enabled=precision != dtype):
            out = network.generate(**batch, max_new_tokens=new, do_sample=False, pad_token_id=0)
        told = {"tokens": out[:, width:].numpy(force=True)}
        # Only the first unit is compared, and the gaps take as long as a unit.
        return len(prompts) * new, lambda: told if index else {**told, "gaps": gaps(out)}

    @torch.inference_mode()
    def gaps(out):
        """The distance of the two largest logits at every new token, [prompts, new]; a row at a time."""
        rows = []
        for i, ids in enumerate(prompts):
            seen = out[i : i + 1, width - len(ids) :]
            logits = network(input_ids=seen, logits_to_keep=new + 1, use_cache=False).logits[0, :-1].float()
            best = logits.topk(2).values
            rows.append((best[:, 0] - best[:, 1]).numpy(force=True))
        return np.stack(rows)

    return unit
