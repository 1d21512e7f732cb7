"""A run's prompts as a PEFT folder with a model card, and back. PEFT itself is not needed for either."""
