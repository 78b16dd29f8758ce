"""The trainer: loss, one jitted and sharded step for every stage, the loop, checkpoints and metrics."""
