"""Paired benchmarks: every contender in a process of its own, one at work at a time, compared round by round.

`pairing` runs the contenders, `worker` is what each of their processes runs, `report` makes ratios and tables, `inputs`
gives all the same rows and weights; each other file is a case. The files named torch_* are the other side's contenders:
they import nothing of br_jax, so that their processes carry no JAX.
"""
