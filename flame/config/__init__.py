"""What a user may set: the schema of a TOML and of flags, older spellings, the help page. Imports: errors."""
