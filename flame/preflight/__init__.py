"""`python -m flame.preflight`: the help page, and what is rejected before a launch.
Imports: all rooms above, never torch."""
