import errno
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch

from convette.errors import FileFormatError, InterruptedRun, StorageError, UsageError
from convette.training import CheckpointFolder, Event, Method, TrainSettings, train
from convette.training.checkpoints import decode, encode, random_state, set_random_state

SETTINGS = TrainSettings(epochs=3, batch_size=16, accumulate=2)
STEPS = 9


class StopAt(Method):
    """Sends this process a signal at a step; carries a state of its own that grows."""

    name = "stop"
    events = frozenset({Event.BATCH_START, Event.BEFORE_FORWARD})

    def __init__(self, step, number=signal.SIGTERM):
        self.step, self.number, self.calls = step, number, torch.zeros(2)

    def apply(self, event, trainer):
        if event is Event.BEFORE_FORWARD:  # random numbers and own state matter to the result
            self.calls = self.calls + torch.rand(2)
            trainer.state.images = trainer.state.images * (1 + 0.01 * self.calls[0])
        elif trainer.state.clock.step == self.step:
            os.kill(os.getpid(), self.number)

    def state_dict(self):
        return {"calls": self.calls, "words": ["a", {"b": 1.5}]}

    def load_state_dict(self, state):
        assert state["words"] == ["a", {"b": 1.5}]
        self.calls = state["calls"]


@pytest.mark.parametrize("step", [0, 2, 3, 7, 8])
@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_a_resumed_run_equals_an_undisturbed_one_bit_for_bit(step, optimizer, data, make_network, equal, tmp_path):
    settings = TrainSettings(epochs=3, batch_size=16, accumulate=2, optimizer=optimizer)
    whole = train(make_network(dropout=0.3), data, settings, methods=[StopAt(-1)])
    with pytest.raises(InterruptedRun, match="SIGTERM") as caught:
        train(make_network(dropout=0.3), data, settings, methods=[StopAt(step)], checkpoint_dir=tmp_path)
    assert caught.value.exit_code == 5
    torch.manual_seed(77)
    again = train(make_network(dropout=0.3), data, settings, methods=[StopAt(-1)], checkpoint_dir=tmp_path)
    assert again.resumed_from == step + 1 and again.steps == STEPS
    assert equal(whole.model, again.model)
    for one, other in zip(whole.history, again.history, strict=True):
        assert (one.train_loss, one.terms, one.train_accuracy) == (other.train_loss, other.terms, other.train_accuracy)
        assert (one.validation_loss, one.learning_rate) == (other.validation_loss, other.learning_rate)


def test_a_finished_run_returns_at_once(data, make_network, equal, tmp_path):
    one = train(make_network(), data, SETTINGS, checkpoint_dir=tmp_path)
    two = train(make_network(), data, SETTINGS, checkpoint_dir=tmp_path)
    assert two.resumed_from == STEPS and equal(one.model, two.model) and one.history == two.history


def test_ctrl_c_writes_a_checkpoint_and_the_handlers_come_back(data, make_network, tmp_path):
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(InterruptedRun, match="SIGINT after step 5"):
        train(make_network(), data, SETTINGS, methods=[StopAt(4, signal.SIGINT)], checkpoint_dir=tmp_path)
    assert signal.getsignal(signal.SIGINT) is before
    with pytest.raises(InterruptedRun, match="nothing was kept"):
        train(make_network(), data, SETTINGS, methods=[StopAt(4)])


def test_the_log_of_a_resumed_run_has_every_epoch_once(data, make_network, tmp_path):
    with pytest.raises(InterruptedRun):
        train(
            make_network(), data, SETTINGS, methods=[StopAt(4)], checkpoint_dir=tmp_path / "c", log_dir=tmp_path / "l"
        )
    train(make_network(), data, SETTINGS, methods=[StopAt(-1)], checkpoint_dir=tmp_path / "c", log_dir=tmp_path / "l")
    assert (tmp_path / "l" / "log.csv").read_text().count("\ntrain,") == 3
    assert '"event": "resumed", "step": 5' in (tmp_path / "l" / "log.jsonl").read_text()


def test_the_last_few_are_kept_and_step_ones_are_written_when_asked(data, make_network, tmp_path):
    settings = TrainSettings(epochs=1, batch_size=16, checkpoint_steps=2, keep_checkpoints=3)
    train(make_network(), data, settings, checkpoint_dir=tmp_path)
    assert [path.name[11:20] for path in CheckpointFolder(tmp_path).paths()] == ["000000002", "000000004", "000000006"]


def test_a_checkpoint_of_another_run_is_refused_by_the_key(data, make_network, tmp_path):
    train(make_network(), data, SETTINGS, checkpoint_dir=tmp_path)
    with pytest.raises(UsageError, match=r"train\.epochs = 3, not 4"):
        train(make_network(), data, TrainSettings(epochs=4, batch_size=16, accumulate=2), checkpoint_dir=tmp_path)
    with pytest.raises(FileFormatError, match="does not fit the network"):
        train(make_network(norm=False), data, SETTINGS, checkpoint_dir=tmp_path)


def test_a_full_disk_is_one_line_and_leaves_the_earlier_checkpoint(data, make_network, tmp_path, monkeypatch):
    write = Path.write_bytes

    def full(path, content):
        if len(list(tmp_path.glob("checkpoint-*"))) == 1:
            write(path, content[: len(content) // 2])
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(path, content)

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(StorageError, match="no space left"):
        train(make_network(), data, SETTINGS, checkpoint_dir=tmp_path)
    monkeypatch.undo()
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-000000003.safetensors"]
    assert train(make_network(), data, SETTINGS, checkpoint_dir=tmp_path).resumed_from == 3


KILLED = """
import os, signal, sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
import torch
from conftest import small_data, small_network
from convette.training import TrainSettings, train

torch.set_num_threads(1)
folder, write = Path(sys.argv[2]), Path.write_bytes

def killed(path, content):
    if len(list(folder.glob("checkpoint-*"))) == 2:
        write(path, content[: len(content) // 2])
        os.kill(os.getpid(), signal.SIGKILL)
    return write(path, content)

Path.write_bytes = killed
train(small_network(dropout=0.3), small_data(), TrainSettings(epochs=3, batch_size=16, accumulate=2), checkpoint_dir=folder)
"""


def test_kill_9_while_writing_leaves_the_previous_one_loadable(data, make_network, equal, tmp_path):
    script = tmp_path / "killed.py"
    script.write_text(textwrap.dedent(KILLED))
    folder = tmp_path / "checkpoints"
    done = subprocess.run(
        [sys.executable, str(script), str(Path(__file__).parent), str(folder)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert len(list(folder.glob(".checkpoint-*"))) == 1  # the half-written one
    again = train(make_network(dropout=0.3), data, SETTINGS, checkpoint_dir=folder)
    assert again.resumed_from == 6 and not list(folder.glob(".checkpoint-*"))
    assert equal(again.model, train(make_network(dropout=0.3), data, SETTINGS).model)


def test_a_tree_comes_back_as_it_was_without_pickle():
    weight = torch.randn(3, 4)
    tree = {
        "a": weight,
        "view": weight[:, :2],
        "transposed": weight.t(),
        "deep": [{"x": torch.arange(3)}, None, True, 1.25, "word", torch.tensor(2.5)],
        "half": torch.randn(2).bfloat16(),
        "empty": {},
    }
    content = encode(tree)
    back = decode(content, "here")
    assert torch.equal(back["a"], weight) and torch.equal(back["view"], weight[:, :2])
    assert torch.equal(back["transposed"], weight.t()) and torch.equal(back["half"], tree["half"])
    assert back["deep"][1:5] == [None, True, 1.25, "word"] and back["deep"][5].shape == () and back["empty"] == {}
    assert b"pickle" not in content


@pytest.mark.parametrize("damage", [lambda c: c[:-10], lambda c: c[:5], lambda c: b"\xff" * 8 + c[8:], lambda c: b""])
def test_damage_is_found_and_the_one_before_is_taken(damage, tmp_path):
    folder = CheckpointFolder(tmp_path, keep=2)
    folder.write(1, {"x": torch.ones(100)})
    later = folder.write(2, {"x": torch.zeros(100)})
    later.write_bytes(damage(later.read_bytes()))
    found = folder.read_latest()
    assert found is not None and found[0].name == "checkpoint-000000001.safetensors"
    found[0].write_bytes(b"nothing")
    with pytest.raises(FileFormatError, match="not a whole checkpoint"):
        folder.read_latest()
    assert CheckpointFolder(tmp_path / "none").read_latest() is None


def test_random_numbers_go_on_where_they_were():
    import random

    import numpy

    def draw():
        return random.random(), random.gauss(0, 1), numpy.random.rand(), numpy.random.randn(), float(torch.randn(()))

    draw()
    state = decode(encode(random_state(torch.device("cpu"))), "here")
    expected = draw()
    draw()
    set_random_state(state, torch.device("cpu"))
    assert draw() == expected
