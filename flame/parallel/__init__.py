"""Tensor, context and pipeline parallelism of a family, and FSDP2 around it. Imports: models, config."""
