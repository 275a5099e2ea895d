"""SIGTERM, by which schedulers announce that a run will be killed."""

import signal
import threading
from types import FrameType

from lightning.pytorch import Trainer

from mh_lightning.compat.lightning_names import SubprocessScriptLauncher, forget_sigterm


class StopSignal:
    """Notes SIGTERM, so that the run can stop where its state is whole.

    It takes the place of Lightning's handler, which starts a collective in the middle of whatever the process does. The
    trainer puts back the handlers that were there before the run.
    """

    def __init__(self) -> None:
        self.received = False

    def listen(self, trainer: Trainer) -> None:
        """Note the signal from now on, and hand it on to the processes that this one has started as other ranks."""
        self.received = bool(trainer.received_sigterm)  # before training
        forget_sigterm(trainer)

        def note(number: int, frame: FrameType | None) -> None:
            launcher = trainer.strategy.launcher
            if not self.received and isinstance(launcher, SubprocessScriptLauncher):
                launcher.kill(signal.SIGTERM)
            self.received = True

        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, note)
