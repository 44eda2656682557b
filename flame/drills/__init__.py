"""Drills: faults injected into a tiny job, to check on any machine that nothing is lost; see docs/drills.md."""
