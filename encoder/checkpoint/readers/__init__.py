"""One reader for each format, and the registry of them all. docs/adding-a-checkpoint-format.md is the recipe."""
