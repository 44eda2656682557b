"""DCP checkpoints that are complete or not there: saved, verified, rotated, resumed. Imports: config, runtime."""
