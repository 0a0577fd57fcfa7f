"""The mesh, every PartitionSpec, and the collectives written by hand."""
