"""flame: a thin recipe layer that trains language models on torchtitan. Importing it has no side effect."""

__version__ = "0.1.0"
