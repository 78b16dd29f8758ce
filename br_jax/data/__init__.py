"""Rows of text, prompt templates and answer masks, Grain batches, and the mixing of user data."""
