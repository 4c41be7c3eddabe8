"""Label rules of recurrent layers: ``nn.LSTM``, ``nn.GRU``, ``nn.RNN``, all layers and directions in one call.

A hidden unit owns a row of every gate and the columns that read its output. Without them it reads nothing and nobody
reads it (its output is 0 where it starts at 0, as its candidate is tanh(0)), so removing it is exact. A module holds
one ``hidden_size``: unit u of all its layers and directions is one unit.
"""

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from convette.surgery._labels import spread, varying, vector_of
from convette.surgery._records import Call, Layers, Operand
from convette.surgery._rules_compute import _zeros
from convette.surgery._tracer import Tracer


def recurrent(tracer: Tracer, call: Call) -> Any:
    """``lstm``, ``gru``, ``rnn_tanh``, ``rnn_relu`` on a padded batch; packed sequences and projections are frozen."""
    inputs, states, weights, biased, layers, _, _, both_ways, batch_first = _arguments(call)
    ways, kinds = (2 if both_ways else 1), (4 if biased else 2)
    if weights is None or len(weights) != layers * ways * kinds:
        tracer.freeze(call)
        return None
    columns = weights[1]
    units = columns.shape[1]
    if units == 1:
        labels = _zeros(1)
    elif tracer.is_parameter(columns):
        labels = tracer.own(columns, 1, "consumer")
    else:
        labels = tracer.store.fresh(units)
    batch = 0 if batch_first else 1
    given, passing = _read(tracer, call, inputs, batch)
    rows, output = labels.repeat(columns.shape[0] // units), labels.repeat(ways)
    for place in range(layers * ways):
        into, back, *biases = weights[place * kinds : (place + 1) * kinds]
        read = given if place < ways else output
        tracer.bind(into, 0, rows, "producer", call.index)
        tracer.bind(into, 1, read, "consumer", call.index)
        tracer.bind(back, 0, rows, "producer", call.index)
        tracer.bind(back, 1, labels, "consumer", call.index)
        for bias in biases:
            tracer.bind(bias, 0, rows, "producer", call.index)
    for state in states:
        _start(tracer, call, state, labels)
    last = [_spread(labels, 2, item) + _moved(passing, 1, item) for item in call.out[1:]]
    return [_spread(output, 2, call.out[0]) + _moved(passing, batch, call.out[0]), *last]


def _arguments(call: Call) -> tuple[Any, ...]:
    """Return the arguments of a call on a padded batch, its initial states as a list; no weights for any other form."""
    inputs, states, weights, *rest = call.args
    packed = isinstance(weights, Tensor) or not isinstance(weights, Sequence) or len(rest) != 6
    if packed or (call.name == "lstm") == isinstance(states, Tensor):
        return inputs, [], None, False, 0, 0.0, False, False, False
    return inputs, [states] if isinstance(states, Tensor) else list(states), weights, *rest


def _read(tracer: Tracer, call: Call, inputs: Tensor, batch: int) -> tuple[Tensor, list[Tensor]]:
    """Return the labels of the features that are read, and those of the batch, which pass; steps in time stay."""
    passing, fixed = [], False
    for layer in tracer.layers(inputs):
        axes = varying(layer)
        if axes == (batch,):
            passing.append(vector_of(layer))
        elif axes and axes != (2,):
            tracer.store.freeze(layer, call.index)
            fixed = True
    if fixed:
        tracer.report(call)
    labels = tracer.axis_vector(inputs, 2, call.index)
    return _zeros(inputs.shape[2]) if labels is None else labels, passing


def _start(tracer: Tracer, call: Call, state: Tensor, labels: Tensor) -> None:
    """Tie the units to the state they start from: zeros follow them, a state without labels fixes them."""
    layers = _spread(labels, 2, state)
    operand = tracer.operand(state, state.shape)
    known = operand.blank is not None or any(2 in varying(layer) for layer in operand.layers)
    if layers and not known:
        tracer.report(call)
    tracer.align([Operand((False, False, True), layers), operand], call.index)


def _spread(labels: Tensor, axis: int, like: Tensor) -> Layers:
    return (spread(labels, axis, like.shape),) if len(labels) > 1 and labels.stride(0) else ()


def _moved(vectors: Sequence[Tensor], axis: int, like: Tensor) -> Layers:
    return tuple(spread(vector, axis, like.shape) for vector in vectors)
