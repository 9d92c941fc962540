"""Stored tensors: where their bytes are, how their numbers are encoded, and which parameters of the model they are."""
