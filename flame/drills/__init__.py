"""Drills: faults made on purpose in a tiny job, to see on a laptop or a cluster that nothing is lost.

`python -m flame.drills [NAME ...] [--nproc N]`; see docs/drills.md.
"""
