"""The models of transformers and flash-linear-attention as torchtitan trains them: a row a family, one wrapper,
initialization, loss and FLOPs. Imports: config, runtime."""
