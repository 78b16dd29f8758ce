"""What a model is worth: the suite of held-out prompts, rules for a task's answers, judges of harm."""
