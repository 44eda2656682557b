"""The training step and what surrounds it: trainer, schedule, validation, metrics, the job from start to export.
Imports: all rooms above."""
