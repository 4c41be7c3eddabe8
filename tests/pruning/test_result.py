"""What a result says of the layers: narrower ones, those that were left out, those that un-tying wrapped."""

import torch

from convette.models import resnet20
from convette.pruning._blocks import untied
from convette.pruning.result import widths_of
from convette.surgery import Remove, apply


def test_layers_that_were_left_out_or_wrapped_are_named_as_they_were():
    network, example = resnet20(), torch.zeros(1, 3, 16, 16)
    whole = widths_of(network, network)
    assert len(whole) == 20 and all(before == after for before, after in whole.values())
    wrapped = untied(resnet20(), example)
    assert widths_of(network, wrapped) == whole
    apply(wrapped, Remove("layer2.1"))
    widths = widths_of(network, wrapped)
    left_out = {name for name, (_, after) in widths.items() if not after}
    assert left_out == {"layer2.1.conv1", "layer2.1.conv2"} and list(widths) == list(whole)
