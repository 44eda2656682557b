"""Checkpoints: what torchtitan's manager lacks, and conversion to and from Hugging Face."""
