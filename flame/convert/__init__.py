"""Checkpoints to and from Hugging Face folders, with a proof of each conversion.
Imports: checkpoint, models, titan, and data for the tokenizer."""
