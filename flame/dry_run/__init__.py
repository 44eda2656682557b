"""The dry run: what a job would train, need and cost, found in one process. Imports: all rooms above."""
