"""Why it works: what a gradient step does to safety, the loss round a model, what a merge can change."""
