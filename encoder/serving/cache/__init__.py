"""Results by job, each job computed once: in memory, and behind that in a folder on disk.

key.py names a result for all time, memory.py and disk.py are the two tiers, folder.py knows the files of the second.
"""

from encoder.serving.cache.result_cache import ResultCache

__all__ = ["ResultCache"]
