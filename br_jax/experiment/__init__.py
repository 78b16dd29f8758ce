"""Experiments: who trains on what and how well each method holds, from one user to a grid, and their reports.

users, methods, tasks: the tables; recipe*: rows; run: one user's models and adapters; grid: the engine; pipeline: one
run stage by stage; frame, gates: results; report, tables, details, figures: what is written of them.
"""
