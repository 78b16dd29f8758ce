"""Many users' adapters trained at once over one base: each its own run, to the rounding of a sum."""
