"""What a diffusion system wants from the encoder, as data.

`preset.py` says what a preset can say, `built_in/` has one for each known system, `preset_file.py` reads a user's own
from TOML, and `catalog.py` holds those of one service by name.
"""
