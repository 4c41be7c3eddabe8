"""Recurrent layers: hidden units and input features go, in every form of the layer, exactly."""

import copy
import json

import pytest
import torch
from torch import nn

from convette import surgery
from convette.cost import WidthCost, count
from convette.surgery import Origin, edit_from_json, replay, set_origin

KINDS = {"lstm": nn.LSTM, "gru": nn.GRU, "rnn": nn.RNN}


class Recurrent(nn.Module):
    """A recurrent layer between two linear ones; its last states are read too."""

    def __init__(self, kind="lstm", **options):
        super().__init__()
        self.stem = nn.Linear(7, 9)
        self.rnn = KINDS[kind](9, 6, **options)
        self.head = nn.Linear(12 if self.rnn.bidirectional else 6, 4)
        self.side = nn.Linear(6, 3)

    def forward(self, x):
        y, last = self.rnn(self.stem(x).relu())
        last = last[0] * last[1] if isinstance(last, tuple) else last
        return self.head(y), self.side(last.mean(0))


class Rows(nn.Module):
    """Rows and columns of an image, each read both ways; both joined for a linear layer (Sequencer)."""

    def __init__(self, width, hidden, kind):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.down = kind(width, hidden, batch_first=True, bidirectional=True)
        self.across = kind(width, hidden, batch_first=True, bidirectional=True)
        self.join = nn.Linear(4 * hidden, width)

    def forward(self, x):
        b, h, w, c = x.shape
        y = self.norm(x)
        down, _ = self.down(y.permute(0, 2, 1, 3).reshape(-1, h, c))
        across, _ = self.across(y.reshape(-1, w, c))
        down = down.reshape(b, w, h, -1).permute(0, 2, 1, 3)
        return x + self.join(torch.cat([down, across.reshape(b, h, w, -1)], -1))


class Sequencer(nn.Module):
    """A stem, two blocks and a head."""

    def __init__(self, kind=nn.LSTM):
        super().__init__()
        self.stem = nn.Conv2d(3, 10, 4, 4)
        self.blocks = nn.Sequential(Rows(10, 6, kind), Rows(10, 5, kind))
        self.head = nn.Linear(10, 4)

    def forward(self, x):
        return self.head(self.blocks(self.stem(x).permute(0, 2, 3, 1)).mean((1, 2)))


def every_second(graph):
    return {group.name: torch.arange(group.size)[::2] for group in graph}


def drawn(make, seed=0):
    torch.manual_seed(seed)
    return make().double().eval()


def flat(output):
    return [output] if isinstance(output, torch.Tensor) else [t for item in output for t in flat(item)]


def assert_exact(model, example, selection=None):
    """Shrink a copy of `model`; it must be the masked network, and `model` stay as it was. Return the copy."""
    graph = surgery.trace(model, example)
    selection = selection or every_second(graph)
    edit = graph.shrink(selection)
    args = example if isinstance(example, tuple) else (example,)
    with surgery.masked(model, graph, selection) as same, torch.no_grad():
        expected = flat(same(*args))
    small = copy.deepcopy(model)
    surgery.apply(small, edit, example=example, prove=True, tolerance=1e-12)
    with torch.no_grad():
        for given, wanted in zip(flat(small(*args)), expected, strict=True):
            torch.testing.assert_close(given, wanted, rtol=1e-12, atol=1e-12)
    return small, edit


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("layers", [1, 3])
@pytest.mark.parametrize("both_ways", [False, True])
@pytest.mark.parametrize("bias, batch_first", [(True, True), (False, True), (True, False)])
def test_every_form_shrinks_exactly_and_again_from_json(kind, layers, both_ways, bias, batch_first):
    def make():
        return Recurrent(kind, num_layers=layers, bidirectional=both_ways, bias=bias, batch_first=batch_first)

    model, x = drawn(make), torch.randn(2, 5, 7).double()
    graph = surgery.trace(model, x)
    assert {group.name: group.size for group in graph} == {"stem": 9, "rnn": 6}
    assert not graph.frozen and not graph.records.needed
    small, edit = assert_exact(model, x)
    assert (small.rnn.input_size, small.rnn.hidden_size) == (5, 3)
    assert not edit.rewrites
    ways = 2 if both_ways else 1
    gates = {"lstm": 4, "gru": 3, "rnn": 1}[kind]
    assert small.rnn.weight_hh_l0.shape == (gates * 3, 3)
    if layers > 1:
        assert small.rnn.weight_ih_l2.shape == (gates * 3, ways * 3)
    again = replay(drawn(make, 1), [edit_from_json(json.loads(json.dumps(edit.to_json())))])
    again.load_state_dict(small.state_dict())
    for a, b in zip(flat(again(x)), flat(small(x)), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("kind", ["lstm", "gru"])
def test_a_trace_with_values_is_the_same(kind):
    model = drawn(lambda: Recurrent(kind, bidirectional=True))
    x = torch.randn(5, 2, 7).double()
    plain, run = surgery.trace(model, x), surgery.trace(model, x, values=True)
    assert torch.equal(plain.roots, run.roots)
    assert [group.name for group in plain] == [group.name for group in run]


def test_relu_and_a_single_sequence():
    model, x = drawn(lambda: Recurrent("rnn", nonlinearity="relu", bidirectional=True)), torch.randn(5, 7).double()
    graph = surgery.trace(model, x)
    assert {group.name for group in graph} == {"stem", "rnn"}
    assert_exact(model, x)


def test_what_a_failed_edit_changed_is_taken_back():
    model, x = drawn(lambda: Recurrent(num_layers=2, bidirectional=True)), torch.randn(5, 2, 7).double()
    edit = surgery.trace(model, x).shrink({"rnn": torch.tensor([0, 2, 5])})
    before, parameters = flat(model(x)), dict(model.named_parameters())
    change = edit.apply(model)
    assert all(a is b for a, b in zip(model.rnn._flat_weights, model.rnn.parameters(), strict=True))
    assert model.rnn.hidden_size == 3
    model(x)
    change.revert()
    assert all(parameters[name] is parameter for name, parameter in model.named_parameters())
    assert all(a is b for a, b in zip(model.rnn._flat_weights, model.rnn.parameters(), strict=True))
    assert (model.rnn.input_size, model.rnn.hidden_size) == (9, 6)
    for a, b in zip(flat(model(x)), before, strict=True):
        assert torch.equal(a, b)


def test_the_optimiser_and_an_averaged_copy_follow():
    model, x = drawn(lambda: Recurrent(num_layers=2, bidirectional=True)).train(), torch.randn(5, 2, 7).double()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)

    def step():
        optimizer.zero_grad()
        torch.stack([part.square().mean() for part in flat(model(x))]).sum().backward()
        optimizer.step()

    step()
    average = copy.deepcopy(model)
    old = {name: optimizer.state[p]["momentum_buffer"] for name, p in model.named_parameters()}
    kept = torch.tensor([1, 2, 4])
    change = surgery.apply(model, surgery.trace(model, x).shrink({"rnn": kept}))
    change.migrate_optimizer(optimizer)
    change.migrate(average)
    rows = torch.cat([kept + 6 * gate for gate in range(4)])
    columns = torch.cat([kept, kept + 6])
    wanted = old["rnn.weight_ih_l1_reverse"][rows][:, columns]
    assert torch.equal(optimizer.state[model.rnn.weight_ih_l1_reverse]["momentum_buffer"], wanted)
    assert {id(p) for p in optimizer.param_groups[0]["params"]} == {id(p) for p in model.parameters()}
    for a, b in zip(flat(average.eval()(x)), flat(model.eval()(x)), strict=True):
        assert torch.equal(a, b)
    before = model.rnn.weight_hh_l0.clone()
    model.train()
    step()
    assert not torch.equal(before, model.rnn.weight_hh_l0)


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU])
def test_rows_and_columns_of_an_image(kind):
    model, x = drawn(lambda: Sequencer(kind)), torch.randn(2, 3, 16, 12).double()
    graph = surgery.trace(model, x)
    sizes = {"stem": 10, "blocks.0.down": 6, "blocks.0.across": 6, "blocks.1.down": 5, "blocks.1.across": 5}
    assert {group.name: group.size for group in graph} == sizes
    assert not graph.frozen
    # The norms run over the channels of the stem: they stay here, for the comparison with the masked network.
    assert_exact(model, x, {name: torch.arange(0, size, 2) for name, size in sizes.items() if name != "stem"})
    surgery.apply(model, graph.shrink(every_second(graph)), example=x, prove=True, tolerance=1e-12)


def test_cost_is_counted_and_predicted_exactly():
    model, x = drawn(lambda: Recurrent(num_layers=2, bidirectional=True)).float(), torch.randn(5, 2, 7)
    steps = 5 * 2
    hidden = steps * 2 * (4 * 6 * (9 + 6) + 4 * 6 * (12 + 6))  # both ways, two layers: inputs and hidden units
    assert count(model, x).macs == steps * 7 * 9 + hidden + steps * 12 * 4 + 2 * 6 * 3
    for net, example in ((model, x), (drawn(Sequencer).float(), torch.randn(1, 3, 16, 12))):
        graph = surgery.trace(net, example)
        costs = WidthCost(net, example, graph)
        assert costs.exact
        selection = every_second(graph)
        predicted = costs.macs(selection), costs.parameters(selection)
        surgery.apply(net, graph.shrink(selection))
        cost = count(net, example)
        assert predicted == (cost.macs, cost.parameters)


def test_a_file_brings_the_shrunk_network_back(tmp_path):
    model, x = set_origin(drawn(Sequencer).float(), Origin("tests:sequencer", {})), torch.randn(2, 3, 16, 12)
    graph = surgery.trace(model, x)
    surgery.apply(model, graph.shrink(every_second(graph)))
    surgery.save_model(model, tmp_path / "small.safetensors")
    loaded = surgery.load_model(tmp_path / "small.safetensors", lambda _: Sequencer())
    assert torch.equal(loaded(x), model(x))
    assert loaded.get_submodule("blocks.0.down").hidden_size == 3


class Started(nn.Module):
    """An LSTM or GRU that is given the state it starts from."""

    def __init__(self, start, kind=nn.GRU):
        super().__init__()
        self.rnn = kind(5, 6)
        self.first = nn.Parameter(torch.randn(1, 1, 6))
        self.before = nn.GRU(5, 6)
        self.start = start
        self.head = nn.Linear(6, 3)

    def forward(self, x, state=None):
        if self.start == "learned":
            state = self.first.expand(-1, x.shape[1], -1).contiguous()
        elif self.start == "zeros":
            state = torch.zeros(1, x.shape[1], 6, dtype=x.dtype)
        elif self.start == "earlier":
            state = self.before(x)[1].tanh()
        elif self.start == "constant":
            state = torch.full((), 0.5, dtype=x.dtype).repeat(1, x.shape[1], 6)
        return self.head(self.rnn(x, state)[0])


@pytest.mark.parametrize("start", ["learned", "zeros", "earlier"])
def test_a_state_to_start_from_follows(start):
    model, x = drawn(lambda: Started(start)), torch.randn(4, 2, 5).double()
    graph = surgery.trace(model, x)
    assert [group.size for group in graph] == [6] and not graph.frozen
    small, _ = assert_exact(model, x)
    assert small.rnn.hidden_size == 3
    if start == "earlier":
        assert small.before.hidden_size == 3


def test_a_state_that_is_given_fixes_the_units_by_name():
    x, state = torch.randn(4, 2, 5).double(), torch.randn(1, 2, 6).double()
    graph = surgery.trace(drawn(lambda: Started("given")), (x, state))
    assert not graph.groups
    assert [(item.name, item.module) for item in graph.frozen] == [("gru", "rnn")]
    graph = surgery.trace(drawn(lambda: Started("constant")), x)
    assert not graph.groups
    assert [(item.name, item.module) for item in graph.frozen] == [("gru", "rnn")]


class Odd(nn.Module):
    """Forms of the layer that stay as they are, behind a linear layer."""

    def __init__(self, form):
        super().__init__()
        self.form = form
        self.stem = nn.Linear(5, 8)
        self.rnn = nn.LSTM(8, 6, proj_size=3) if form == "projected" else nn.LSTM(8, 6)

    def forward(self, x):
        x = self.stem(x)
        if self.form == "packed":
            packed = nn.utils.rnn.pack_padded_sequence(x, torch.tensor([4, 2]))
            return self.rnn(packed)[1][0].mean(-1)
        if self.form == "in time":  # channels of the linear layer one after the other
            return self.rnn(x.flatten(0, 1).t()[:, :, None].expand(8, 8, 8))[0].mean(-1)
        return self.rnn(x)[0].mean(-1)


@pytest.mark.parametrize(
    "form, names, removable",
    [
        ("projected", {"lstm"}, set()),
        ("packed", {"_pack_padded_sequence", "lstm"}, set()),
        ("in time", {"lstm"}, {"rnn"}),
    ],
)
def test_other_forms_are_frozen_by_name(form, names, removable):
    graph = surgery.trace(drawn(lambda: Odd(form)), torch.randn(4, 2, 5).double())
    assert {group.name for group in graph} == removable
    assert {item.name for item in graph.frozen} == names


class Twice(nn.Module):
    """One layer read twice, the second time on its own output, with a shortcut around it."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Linear(5, 6)
        self.rnn = nn.LSTM(6, 3, bidirectional=True)
        self.head = nn.Linear(6, 2)

    def forward(self, x):
        x = self.stem(x)
        y = x + self.rnn(x)[0]
        return self.head(y + self.rnn(y)[0])


def test_a_layer_read_twice_with_shortcuts_ties_both_directions():
    model, x = drawn(Twice), torch.randn(4, 2, 5).double()
    graph = surgery.trace(model, x)
    assert [group.size for group in graph] == [3]  # unit u, and features u and u + 3 of the stream
    small, _ = assert_exact(model, x)
    assert (small.rnn.input_size, small.rnn.hidden_size, small.stem.out_features) == (4, 2, 4)


def test_units_grow_exactly():
    model, x = drawn(lambda: Recurrent(num_layers=2, bidirectional=True)), torch.randn(5, 2, 7).double()
    before = flat(model(x))
    surgery.apply(model, surgery.grow(surgery.trace(model, x), {"rnn": 3, "stem": 2}))
    assert (model.rnn.input_size, model.rnn.hidden_size) == (11, 9)
    for a, b in zip(flat(model(x)), before, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
