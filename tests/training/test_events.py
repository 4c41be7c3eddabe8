import itertools

import pytest

from convette.errors import UsageError
from convette.training import Event, Method
from convette.training.events import by_event, in_order


class Named(Method):
    def __init__(self, name, order=0, **rules):
        self.name, self.order, self.events = name, order, frozenset(Event)
        for key, value in rules.items():
            setattr(self, key, value)


def names(methods):
    return [method.name for method in methods]


def test_order_is_declared_not_that_of_registration():
    methods = [Named("late", 5), Named("b"), Named("a"), Named("early", -5)]
    for arrangement in itertools.permutations(methods):
        table = by_event(in_order(arrangement))
        assert names(table[Event.BEFORE_FORWARD]) == ["early", "a", "b", "late"]
        assert names(table[Event.AFTER_FORWARD]) == ["late", "b", "a", "early"]
        assert names(table[Event.EPOCH_START]) == names(table[Event.EPOCH_END])[::-1]


def test_a_method_hears_only_what_it_asked_for():
    method = Named("one")
    method.events = frozenset({Event.AFTER_LOSS})
    table = by_event(in_order([method]))
    assert [event for event in Event if table[event]] == [Event.AFTER_LOSS]


def test_conflicts_missing_requirements_and_twins_are_refused():
    with pytest.raises(UsageError, match="'a' and 'b' cannot be used together"):
        in_order([Named("b"), Named("a", conflicts=("b",))])
    with pytest.raises(UsageError, match="'a' needs method 'c'"):
        in_order([Named("a", requires=("c",))])
    with pytest.raises(UsageError, match="two methods are named 'a'"):
        in_order([Named("a"), Named("a", 3)])
