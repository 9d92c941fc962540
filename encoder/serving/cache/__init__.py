"""The result cache: results by job, in memory and in a folder on disk.

memory.py and disk.py are the two tiers. folder.py knows the files of the second, and key.py names them.
"""

from encoder.serving.cache.result_cache import ResultCache

__all__ = ["ResultCache"]
