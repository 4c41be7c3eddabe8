"""Two processes on one machine, through torchrun and gloo."""

import importlib.util
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from convette.errors import UsageError
from convette.training import TrainSettings, distributed
from convette.training.loaders import cut_epoch

SCRIPT = Path(__file__).parent / "two_ranks.py"


def launch(arguments: list[str]) -> subprocess.Popen:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "torch.distributed.run", *arguments]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture(scope="module")
def alone():
    specification = importlib.util.spec_from_file_location("two_ranks", SCRIPT)
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    torch.set_num_threads(1)
    return {
        "plain": module.equality(shrink=False).state_dict(),
        "shrink": module.equality(shrink=True).state_dict(),
        "digits": module.digits(),
    }


def close(one, other):
    assert one.keys() == other.keys()
    for name in one:
        assert one[name].shape == other[name].shape
        assert torch.allclose(one[name], other[name], atol=1e-6), name


def test_two_ranks_equal_one_process_also_after_an_edit(alone, tmp_path):
    out = tmp_path / "found.pt"
    process = launch(["--standalone", "--nproc_per_node=2", str(SCRIPT), str(out), "plain", "bf16", "shrink", "digits"])
    text, _ = process.communicate(timeout=300)
    assert process.returncode == 0, text
    assert text.count("only once") == 1
    found = torch.load(out, weights_only=True)
    assert found["world"] == 2
    close(found["plain"], alone["plain"])
    assert all(torch.allclose(found["bf16"][name], tensor, atol=0.05) for name, tensor in alone["plain"].items())
    close(found["shrink"], alone["shrink"])
    assert alone["digits"] > 0.93 and abs(found["digits"] - alone["digits"]) < 0.03


def test_two_nodes_of_one_rank_each(alone, tmp_path):
    out = tmp_path / "found.pt"
    meeting = f"--rdzv-endpoint=127.0.0.1:{free_port()}"
    common = ["--nnodes=2", "--nproc_per_node=1", "--rdzv-backend=c10d", "--rdzv-id=convette", meeting]
    agents = [launch([*common, str(SCRIPT), str(out), "shrink"]) for _ in range(2)]
    texts = [agent.communicate(timeout=300)[0] for agent in agents]
    assert [agent.returncode for agent in agents] == [0, 0], texts
    found = torch.load(out, weights_only=True)
    assert found["world"] == 2
    close(found["shrink"], alone["shrink"])


def test_a_batch_is_cut_among_the_ranks():
    shares = cut_epoch(1000, TrainSettings(batch_size=128, accumulate=2), 4)
    assert (shares.batch, shares.steps, shares.images_per_step) == (32, 3, 256)
    with pytest.raises(UsageError, match="cannot be divided among 3 processes; use 129"):
        cut_epoch(1000, TrainSettings(batch_size=128), 3)


def test_alone_everything_is_its_own_answer():
    assert (distributed.rank(), distributed.world_size(), distributed.is_main()) == (0, 1, True)
    assert distributed.broadcast({"a": 1}) == {"a": 1} and distributed.gather(3) == [3]
    distributed.barrier()
    distributed.finish_distributed()
