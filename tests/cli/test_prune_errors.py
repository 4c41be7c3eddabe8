"""What goes wrong in ``convette prune`` is one line with its exit code, or a note; the file that was given stays."""

import pytest
import torch

from convette.cli.main import main
from convette.models import create_model, save


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A network as it comes, one with a weight that is no number, one whose activations are constant."""
    folder = tmp_path_factory.mktemp("networks")
    for name in ("whole", "broken", "dead"):
        model = create_model("resnet20", in_channels=1, seed=0)
        with torch.no_grad():
            if name == "broken":
                model.layer1[0].conv1.weight[0, 0, 0, 0] = float("nan")
            if name == "dead":
                model.bn1.weight.zero_()
                model.bn1.bias.zero_()
        save(model, folder / f"{name}.safetensors")
    return folder


@pytest.mark.parametrize(
    ("name", "options", "code", "said"),
    [
        ("whole", "--budget macs<=0.01% --set prune.min_fraction=0.0", 4, "at the least"),
        ("broken", "--budget macs<=50%", 1, "'layer1.0.conv1.weight' holds values that are not finite"),
        ("whole", "--budget macs<=50% --criterion discriminant_information", 2, "at least two classes"),
        ("dead", "--budget macs<=50% --criterion taylor", 0, "worth the same"),
    ],
)
def test_one_line_and_the_file_stays(capsys, tmp_path, files, name, options, code, said):
    file = files / f"{name}.safetensors"
    before = file.read_bytes()
    always = "--data digits --epochs 0 --device cpu --set prune.steps=1 --set prune.calibration_images=1"
    command = ["prune", str(file), *always.split(), *options.split(), "--out", str(tmp_path / "out.safetensors")]
    assert main(command) == code
    lines = [line for line in capsys.readouterr().err.splitlines() if said in line]
    assert len(lines) == 1 and "Traceback" not in lines[0]
    assert file.read_bytes() == before and (tmp_path / "out.safetensors").exists() == (code == 0)
