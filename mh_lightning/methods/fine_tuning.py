"""Sequential training without any remedy against forgetting but the head's own."""

from mh_lightning.methods.base import ContinualMethod


class FineTuning(ContinualMethod):
    """Train the head, and the backbone unless it is frozen, on each task in turn, with cross-entropy over all classes.

    See `ContinualMethod` for the arguments.
    """
