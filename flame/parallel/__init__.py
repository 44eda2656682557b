"""Tensor, context and pipeline parallelism of a family, and FSDP2 and DDP around it. Imports: models, config."""
