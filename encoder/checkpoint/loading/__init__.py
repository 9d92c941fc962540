"""From a described checkpoint to weights in memory, or in a new folder. Knows no file format."""
