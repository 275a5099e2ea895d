"""Series of runs, their tables, and searches: ``python -m mh_lightning.experiments run|search|tables``."""
