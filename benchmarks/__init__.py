"""The figures of docs/benchmarks.md, one script for each subject, run from the repository's root:

    make bench                                  all that needs no GPU, in ten minutes on two CPUs
    python -m benchmarks.forward --rounds 9     one subject, in its own time; --help has the options

Each measures the service and its peer in processes that take turns, with random weights that it writes first.
report.py defines what a figure is; `make docs` puts the stored ones into docs/benchmarks.md.
"""
