"""The log of a run: CSV and JSON lines always, TensorBoard when asked."""

import csv
import io
import json
from pathlib import Path
from typing import Any

from convette._files import write_text
from convette.errors import UsageError
from convette.training.state import EpochRecord


class TrainLog:
    """Writes ``log.csv`` (one row an epoch) and ``log.jsonl`` (one object an epoch or happening) into a folder.

    Both are rewritten whole after each epoch, atomically: they are small, and a killed or resumed run never leaves
    half a line or an epoch twice.
    """

    def __init__(self, folder: Path, tensorboard: bool = False) -> None:
        self.folder = folder
        self._lines: list[dict[str, Any]] = []
        self._board = _open_board(folder) if tensorboard else None

    def restore(self, history: list[EpochRecord]) -> None:
        """Start from the log that lies in the folder, without the lines later than `history` (a resumed run)."""
        step = history[-1].step if history else 0
        path = self.folder / "log.jsonl"
        if path.exists():
            lines = [json.loads(line) for line in path.read_text().splitlines() if line.strip()]
            self._lines = [line for line in lines if line.get("event") != "epoch" and line.get("step", 0) <= step]
        epochs = [{"event": "epoch", **record.to_json()} for record in history]
        self._lines = sorted([*self._lines, *epochs], key=lambda line: line.get("step", 0))

    def event(self, name: str, step: int, **facts: Any) -> None:
        """Note something that happened once (a decision, a change of structure, a resumption)."""
        self._lines.append({"event": name, "step": step, **facts})

    def epoch(self, record: EpochRecord, history: list[EpochRecord]) -> None:
        """Add the epoch `record` and write the files; `history` is everything so far, `record` included."""
        self._lines.append({"event": "epoch", **record.to_json()})
        self.write(history)
        if self._board is not None:
            for key, value in _row(record).items():
                if isinstance(value, float):
                    self._board.add_scalar(key, value, record.step)
            self._board.flush()

    def write(self, history: list[EpochRecord]) -> None:
        """Write both files."""
        rows = [_row(record) for record in history]
        columns = list(dict.fromkeys(key for row in rows for key in row))
        text = io.StringIO()
        table = csv.DictWriter(text, columns, lineterminator="\n")
        table.writeheader()
        table.writerows(rows)
        write_text(self.folder / "log.csv", text.getvalue())
        write_text(self.folder / "log.jsonl", "".join(json.dumps(line) + "\n" for line in self._lines))

    def close(self) -> None:
        """Close the TensorBoard file."""
        if self._board is not None:
            self._board.close()


def _row(record: EpochRecord) -> dict[str, Any]:
    row = record.to_json()
    terms = row.pop("terms")
    return {**row, **{f"loss_{name}": value for name, value in terms.items()}}


def _open_board(folder: Path) -> Any:
    try:
        from torch.utils.tensorboard.writer import SummaryWriter
    except ImportError as error:
        raise UsageError(
            "train.tensorboard needs the package tensorboard: pip install 'convette[tensorboard]'."
        ) from error
    return SummaryWriter(str(folder / "tensorboard"))
