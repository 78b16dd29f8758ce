"""Writes what a user or a serving stack is given: an adapter, or a model with an adapter folded in.

python experiments/export.py --model=W/provider --adapter=W/released --to=F [--rank=16]    # PEFT's layout
python experiments/export.py --model=W/provider [--adapter=W/released] --format=model --to=F   # a Hugging Face folder

vLLM serves the second without an adapter (the aligned base) and any number of the first on it. A Buffer is refused.
"""

import json

from absl import flags

from br_jax.core.cli import require_flags, run_with_flags

MODEL = flags.DEFINE_string("model", None, "Provider's folder, Hugging Face folder, GGUF file or name on the Hub.")
ADAPTER = flags.DEFINE_string("adapter", None, "Adapter folder in PEFT's layout.")
TO = flags.DEFINE_string("to", None, "Folder to write; an earlier export there is replaced.")
FORMAT = flags.DEFINE_enum("format", "adapter", ["adapter", "model"], "What to write.")
RANK = flags.DEFINE_integer("rank", None, "Rank of the adapter written; default: its own.", lower_bound=1)
ROLE = flags.DEFINE_enum("role", None, ["user"], "What the adapter is, where its folder does not say.")
TEMPLATE = flags.DEFINE_enum("template", "chat", ["chat", "alpaca"], "A provider's folder brings its own.")
DTYPE = flags.DEFINE_enum("dtype", None, ["float32", "bfloat16"], "What is written; default: a provider's, or float32.")
REVISION = flags.DEFINE_string("revision", None, "Of a model on the Hub: branch, tag or commit.")


def main(argv: list[str]) -> None:
    """Flags and one call."""
    from br_jax.provider import export

    require_flags(argv, MODEL, TO)
    figures = export(
        MODEL.value,
        ADAPTER.value,
        TO.value,
        form=FORMAT.value,
        rank=RANK.value,
        role=ROLE.value,
        revision=REVISION.value,
        template=TEMPLATE.value,
        dtype=DTYPE.value,
    )
    print(json.dumps(figures, indent=1))


if __name__ == "__main__":
    run_with_flags(main)
