"""Text to token rows, the same on any number of ranks and resumable at any step: sources, mixture, lanes, loader.
Imports: config, runtime, and checkpoint to read a run that is inspected."""
