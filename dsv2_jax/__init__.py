"""DeepSeek-V2 in JAX."""
