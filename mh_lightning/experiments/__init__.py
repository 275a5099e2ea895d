"""Series of runs, and searches for hyper-parameters: ``python -m mh_lightning.experiments run|search``."""
