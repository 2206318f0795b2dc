"""Native Sparse Attention in models of other libraries. Each part needs its library, and is imported by itself."""
