"""Grids of experiments that share what they can, and their tables and figures."""

from br_jax.sweep.grid import METHODS, Grid, Run, plan, read_cells, render_plan, run_sweep

__all__ = ["METHODS", "Grid", "Run", "plan", "read_cells", "render_plan", "run_sweep"]
