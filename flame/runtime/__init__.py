"""How ranks and run folders live: launch, device, signals, lock, log, consensus. Imports: errors, config."""
