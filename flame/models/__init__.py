"""Models: a table of families, and one class that makes a Hugging Face causal LM a torchtitan model."""
