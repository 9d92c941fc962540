"""The files that checkpoints consist of: where they are, how they are fetched, and what stands in their headers."""
