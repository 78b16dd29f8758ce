"""The other side of `training`: PEFT over transformers on PyTorch. Nothing of br_jax is imported here."""

import math

import numpy as np
import torch
from peft import LoraConfig, PeftModel
from transformers import AutoModelForCausalLM, get_cosine_schedule_with_warmup
from transformers.utils import logging

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def padded(model, adapter, steps, config, threads, dtype):
    """The reference's way: every row padded to max_length, labels -100 wherever there is no answer."""

    def batch(rows):
        shape = (len(rows), config["max_length"])
        tokens, mask, labels = torch.zeros(shape, dtype=torch.long), torch.zeros(shape, dtype=torch.long), None
        labels = torch.full(shape, -100)
        for i, (ids, answer) in enumerate(rows):
            ids = torch.from_numpy(ids)
            tokens[i, : len(ids)], mask[i, : len(ids)] = ids, 1
            labels[i, : len(ids)] = torch.where(torch.from_numpy(answer), ids, -100)
        return {"input_ids": tokens, "attention_mask": mask, "labels": labels}

    def loss(network, batch):
        return network(**batch, use_cache=False).loss

    return _train(model, adapter, steps, config, threads, dtype, batch, loss)


def packed(model, adapter, steps, config, threads, dtype):
    """PEFT at its best: the rows one after another, no padding, logits only where an answer is learnt."""

    def batch(rows):
        lengths = [len(ids) for ids, _ in rows]
        segments = torch.repeat_interleave(torch.arange(len(rows)), torch.tensor(lengths))
        index = torch.arange(len(segments))
        seen = (segments[:, None] == segments[None]) & (index[:, None] >= index[None])
        tokens = torch.from_numpy(np.concatenate([ids for ids, _ in rows]))
        answer = torch.from_numpy(np.flatnonzero(np.concatenate([answer for _, answer in rows])))
        return {
            "input_ids": tokens[None],
            "position_ids": torch.cat([torch.arange(n) for n in lengths])[None],
            "attention_mask": seen[None, None],
            "logits_to_keep": answer - 1,  # what is said there is the next token
            "targets": tokens[answer],
        }

    def loss(network, batch):
        batch = dict(batch)
        targets = batch.pop("targets")
        logits = network(**batch, use_cache=False).logits[0].float()
        return torch.nn.functional.cross_entropy(logits, targets)

    return _train(model, adapter, steps, config, threads, dtype, batch, loss)


def _train(model, adapter, steps, config, threads, dtype, batch, loss):
    """The work: step i on the rows of step i, its outcome the loss."""
    logging.disable_progress_bar()
    torch.set_num_threads(threads)
    base = AutoModelForCausalLM.from_pretrained(model, dtype=getattr(torch, dtype), attn_implementation="sdpa")
    lora = LoraConfig.from_pretrained(adapter)
    lora.lora_dropout, lora.inference_mode = config["dropout"], False
    network = PeftModel.from_pretrained(base, adapter, config=lora, is_trainable=True).to(DEVICE).train()
    trained = [parameter for parameter in network.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=config["learning_rate"], weight_decay=config["weight_decay"])
    warmup = math.ceil(len(steps) * config["warmup_ratio"])
    schedule = get_cosine_schedule_with_warmup(optimizer, warmup, len(steps))

    def unit(index: int):
        value = loss(network, {name: array.to(DEVICE) for name, array in batch(steps[index]).items()})
        value.backward()
        torch.nn.utils.clip_grad_norm_(trained, config["clip_norm"])
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        return sum(len(ids) for ids, _ in steps[index]), value.item()

    return unit
