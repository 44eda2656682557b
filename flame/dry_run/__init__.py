"""What a job would train, need and take on any number of ranks, without a rank. Imports: all rooms above."""
