"""The other side of `training`: PEFT over transformers on PyTorch. Nothing of br_jax is imported here."""

import math

import torch
from peft import LoraConfig, PeftModel
from transformers import AutoModelForCausalLM, get_cosine_schedule_with_warmup
from transformers.utils import logging

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def padded(model, adapter, steps, config, threads, dtype, precision):
    """The reference's way: every row padded to max_length, its mask, labels -100 wherever there is no answer."""

    def loss(network, rows):
        tokens, mask, labels = _pad(rows, config["max_length"])
        return network(input_ids=tokens, attention_mask=mask, labels=labels, use_cache=False).loss

    return _train(model, adapter, steps, config, threads, dtype, precision, loss)[1]


def lean(model, adapter, steps, config, threads, dtype, precision):
    """PEFT at its best: rows padded to the longest, logits at answer tokens alone, and causal attention without a mask.

    Padding on the right is behind every token that counts, so that no mask is needed, and sdpa takes its fast path.
    """

    return _train(model, adapter, steps, config, threads, dtype, precision, _lean_loss)[1]


def _lean_loss(network, rows):
    tokens, _, labels = _pad(rows, max(len(ids) for ids, _ in rows))
    base = network.get_base_model()
    hidden = base.model(input_ids=tokens, use_cache=False).last_hidden_state[:, :-1]
    answer = labels[:, 1:] >= 0
    return torch.nn.functional.cross_entropy(base.lm_head(hidden[answer]).float(), labels[:, 1:][answer])


def job(model, adapter, steps, config, threads, dtype, precision):
    """A whole run, `lean`ly: its outcome is the norm of all B."""

    def unit(index: int):
        network, step = _train(model, adapter, steps, config, threads, dtype, precision, _lean_loss)
        for number in range(len(steps)):
            step(number)
        norms = [
            value.detach().double().square().sum() for name, value in network.named_parameters() if "lora_B" in name
        ]
        return 1, math.sqrt(sum(norms))

    return unit


def _pad(rows, width):
    """Token ids, mask and labels, int64[rows, width]."""
    tokens = torch.zeros((len(rows), width), dtype=torch.long)
    mask, labels = torch.zeros_like(tokens), torch.full_like(tokens, -100)
    for i, (ids, answer) in enumerate(rows):
        ids = torch.from_numpy(ids)
        tokens[i, : len(ids)], mask[i, : len(ids)] = ids, 1
        labels[i, : len(ids)] = torch.where(torch.from_numpy(answer), ids, -100)
    return tokens.to(DEVICE), mask.to(DEVICE), labels.to(DEVICE)


def _train(model, adapter, steps, config, threads, dtype, precision, loss):
    """(Network, the work: step i on the rows of step i, its outcome the loss); bf16 products are autocast's."""
    rounds = precision != dtype
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
        with torch.autocast(DEVICE, torch.bfloat16, enabled=rounds):
            value = loss(network, steps[index])
        value.backward()
        torch.nn.utils.clip_grad_norm_(trained, config["clip_norm"])
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        return sum(len(ids) for ids, _ in steps[index]), value.item()

    return network, unit
