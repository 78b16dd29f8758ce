"""The other side of `generation`: transformers' `generate`. Nothing of br_jax is imported here."""

import numpy as np
import torch
from transformers import AutoModelForCausalLM
from transformers.utils import logging

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def answer(model, prompts, new, stops, batch, threads, dtype, precision):
    """The work: prompts in batches; its outcome the token ids, and how far the two likeliest were apart.

    Prompts are sorted by length. Behind a stop comes the first of them. bf16 products of an f32 model are autocast's.
    """
    logging.disable_progress_bar()
    torch.set_num_threads(threads)
    network = AutoModelForCausalLM.from_pretrained(model, dtype=getattr(torch, dtype), attn_implementation="sdpa")
    network = network.to(DEVICE).eval()
    network.generation_config.eos_token_id = list(stops) or None
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    fill = stops[0] if stops else 0

    @torch.inference_mode()
    def answer_batch(chosen):
        width = max(len(prompts[i]) for i in chosen)
        tokens = torch.zeros((len(chosen), width), dtype=torch.long)
        mask = torch.zeros_like(tokens)
        for row, i in enumerate(chosen):
            first = width - len(prompts[i])
            tokens[row, first:], mask[row, first:] = torch.tensor(prompts[i]), 1
        given = {"input_ids": tokens.to(DEVICE), "attention_mask": mask.to(DEVICE), "pad_token_id": fill}
        with torch.autocast(DEVICE, torch.bfloat16, enabled=precision != dtype):
            out = network.generate(**given, max_new_tokens=new, do_sample=False)[:, width:]
        return torch.nn.functional.pad(out, (0, new - out.shape[1]), value=fill).numpy(force=True)

    def unit(index: int):
        out = np.empty((len(prompts), new), np.int64)
        for first in range(0, len(order), batch):
            chosen = order[first : first + batch]
            out[chosen] = answer_batch(chosen)
        # Only the first unit is compared, and the gaps take as long as a unit.
        return len(prompts), lambda: {"tokens": out} if index else {"tokens": out, "gaps": gaps(out)}

    @torch.inference_mode()
    def gaps(out):
        """The distance of the two largest logits at every new token, [prompts, new]; a row at a time."""
        rows = []
        for ids, new_ids in zip(prompts, out, strict=True):
            seen = torch.tensor([[*ids, *new_ids]], device=DEVICE)
            logits = network(input_ids=seen, logits_to_keep=new + 1, use_cache=False).logits[0, :-1].float()
            best = logits.topk(2).values
            rows.append((best[:, 0] - best[:, 1]).numpy(force=True))
        return np.stack(rows)

    return unit
