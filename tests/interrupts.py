"""Ends of a run at a chosen place, as callbacks of the Trainer: Ctrl-C, another signal, a kill."""

import os
import signal


class Killed(BaseException):
    """What a kill leaves: the last checkpoint, nothing else."""


class End:
    """Before the checkpoint of an epoch's end, or within the epoch.

    batch: as the loss of this step is known; after_step: as it is done, its checkpoint too. by: a
    signal to this process, or an exception.
    """

    def __init__(self, epoch, batch=None, *, after_step=False, by=signal.SIGINT):
        self.epoch, self.batch, self.after_step, self.by = epoch, batch, after_step, by

    def now(self):
        if isinstance(self.by, signal.Signals):
            os.kill(os.getpid(), self.by)
        else:
            raise self.by

    def on_fit_start(self, run) -> None:
        if self.batch is None:
            return
        owner = run._run.context.progress if self.after_step else run._run
        name = "advance" if self.after_step else "correct"
        own = getattr(owner, name)

        def watched(*arguments, **named):
            if (run.epoch, run.batch) == (self.epoch, self.batch):
                self.now()
            return own(*arguments, **named)

        setattr(owner, name, watched)

    def on_epoch_end(self, run, record) -> None:
        if self.batch is None and record["epoch"] == self.epoch:
            self.now()
