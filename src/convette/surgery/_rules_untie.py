"""Label rules of the indices that un-tie a residual stream (`convette.surgery.Untie`)."""

from convette.surgery._records import Call, Layers
from convette.surgery._rules_compute import _input_channels, _result, _zeros
from convette.surgery._tracer import Tracer


def gather(tracer: Tracer, call: Call) -> Layers:
    """What is read from a stream are channels of their own, one an entry of the index; the stream stays as it is."""
    index, axis = call.argument(1, "index"), call.argument(2, "dim") % call.first.ndim
    labels, passing = _input_channels(tracer, call, call.first, axis)
    if labels is not None:
        tracer.store.freeze(labels, call.index)
    return _result(call, tracer.own(index, 0, "index"), axis, passing)


def scatter(tracer: Tracer, call: Call) -> Layers:
    """What is put into a stream goes with its entries of the index; the stream stays as it is."""
    index, axis = call.argument(1, "index"), call.argument(3, "dim") % call.first.ndim
    labels, passing = _input_channels(tracer, call, call.first, axis)
    tracer.bind(index, 0, _zeros(len(index)) if labels is None else labels, "index", call.index)
    return _result(call, _zeros(call.out.shape[axis]), axis, passing)
