"""A byte-level language model, trained with Native Sparse Attention or with dense attention."""
