"""The project's data sets as TFDS builders: a local file, or the public download, prepared once and read at random.

```python
from br_jax.data.builders.load import load_dataset

records = load_dataset("gsm8k", split="train", path="gsm8k_train.jsonl")
```
"""
