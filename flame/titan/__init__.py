"""torchtitan's own models, trained and exported like those of Hugging Face.
Imports: config, checkpoint, models, parallel."""
