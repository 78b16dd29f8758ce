"""The paper's data sets from a local file or their public home, prepared once and read at random; rows made of them.

```python
from br_jax.datasets.load import load_dataset

records = load_dataset("gsm8k", split="train", path="gsm8k_train.jsonl")
```
"""
