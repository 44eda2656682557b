"""Checkpoints to and from Hugging Face folders, each conversion with its verification.
Imports: checkpoint, models and titan."""
