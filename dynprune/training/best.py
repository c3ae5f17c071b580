"""The weights of the best epoch, kept beside the checkpoint, for `--keep-weights best`.

Takes a session after each epoch with its accuracy on validation images. Only epochs in which the selection stands and
the widths are the last ones count: weights of other channels would be another network's.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from dynprune.errors import DynpruneError
from dynprune.files.disk import read_tensors, write_tensors
from dynprune.runs.directory import RunDirectory

if TYPE_CHECKING:
    from dynprune.training.trainee import Trainee

KIND = "best"


class Best:
    """accuracy: of the best epoch so far, on validation images; epoch: its number, 0 if none counted yet."""

    def __init__(self, run: RunDirectory, resumed_at: int):
        """resumed_at: the step that the run goes on from; what a later epoch left is forgotten."""
        self.file, self.accuracy, self.epoch = run.path / "best.safetensors", -1.0, 0
        if resumed_at and self.file.is_file():
            _, facts = read_tensors(self.file, KIND)
            if facts["step"] <= resumed_at:
                self.accuracy, self.epoch = float(facts["val_accuracy"]), int(facts["epoch"])

    def look(self, session: Trainee, epoch: int, accuracy: float) -> None:
        """Keep this epoch's weights if they are the best; of equals the first."""
        if session.settled and accuracy > self.accuracy:
            facts = {"kind": KIND, "step": session.step, "epoch": epoch, "val_accuracy": accuracy}
            write_tensors(self.file, session.model.state_dict(), facts)
            self.accuracy, self.epoch = accuracy, epoch

    def bring_back(self, session: Trainee) -> None:
        """Put the best epoch's weights into the session's network, in place."""
        if not self.epoch:
            return
        tensors, _ = read_tensors(self.file, KIND)
        try:
            session.model.load_state_dict(tensors)
        except RuntimeError as error:
            raise DynpruneError(
                f"{self.file} does not fit the run's network. Delete it and resume: the last weights are kept then."
            ) from error
