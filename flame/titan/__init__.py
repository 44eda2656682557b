"""torchtitan's own models, trained and exported as those of Hugging Face are. Imports: models, parallel, checkpoint."""
