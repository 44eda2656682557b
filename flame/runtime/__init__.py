"""How ranks and run folders live: launch, device, signals, lock, log, agreement. Imports: errors, config."""
