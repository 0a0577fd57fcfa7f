"""Kernels on plain arrays: no configuration, no mesh."""
