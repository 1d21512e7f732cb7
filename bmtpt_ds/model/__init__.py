"""The frozen T5, its checkpoint files, and the prompts in front of it."""
