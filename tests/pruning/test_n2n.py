import itertools

import pytest
import torch
from tests.pruning.conftest import Deep
from torch import nn

from convette.cost import count
from convette.errors import StructureError, UsageError
from convette.pruning._reinforce import Reinforce
from convette.pruning.n2n import (
    FACTORS,
    N2NSettings,
    RemovalPolicy,
    ShrinkPolicy,
    compression_reward,
    constrained_reward,
    layer_states,
    n2n,
    student_reward,
)
from convette.pruning.n2n.policies import LayerFacts
from convette.pruning.n2n.search import _Search
from convette.surgery import trace
from convette.training import TrainSettings

QUICK = TrainSettings(batch_size=256, learning_rate=0.05, augmentation=(), precision="fp32")
STATES = layer_states([LayerFacts(2, 3, 1, 16, 1), LayerFacts(2, 3, 2, 32, 1), LayerFacts(1, 1, 1, 10, 0)])


@pytest.fixture(scope="module")
def teacher():
    torch.manual_seed(0)
    return Deep(3).eval()


def test_rewards_are_the_papers():
    assert compression_reward(50, 100) == pytest.approx(0.75)
    assert compression_reward(100, 100) == 0 and compression_reward(0, 100) == 1
    assert student_reward(0.45, 0.9, 50, 100) == pytest.approx(0.375)
    assert constrained_reward(0.8, True, 3) == 0.8
    assert constrained_reward(0.8, False, 0) == pytest.approx(0.8)
    assert constrained_reward(0.8, False, 15) == -1 and constrained_reward(0.8, False, 99) == -1
    assert -1 < constrained_reward(0.8, False, 5) < constrained_reward(0.8, False, 2)
    assert compression_reward(10, 100) == pytest.approx(0.99) == student_reward(0.9, 0.9, 10, 100)
    values = [compression_reward(100 - saved, 100) for saved in range(101)]
    gains = [b - a for a, b in itertools.pairwise(values)]
    assert min(gains) > 0 and gains == sorted(gains, reverse=True), "increasing, and concave"
    with pytest.raises(UsageError):
        compression_reward(1, 0)


def test_layers_that_are_not_free_are_kept_and_get_no_gradient():
    generator = torch.Generator().manual_seed(0)
    removal, shrink = RemovalPolicy(), ShrinkPolicy()
    for policy, kept in ((removal, False), (shrink, 1.0)):
        actions, log = policy.sample(STATES, [False, True, False], generator)
        assert actions[0] == kept and actions[2] == kept and log.requires_grad
        _, none = policy.sample(STATES, [False] * 3, generator)
        assert float(none) == 0 and not none.requires_grad
    logs = removal(STATES)
    assert torch.allclose(logs.exp().sum(1), torch.ones(3), atol=1e-6)
    actions, log = removal.sample(STATES, [True] * 3, generator)
    assert float(log.detach()) == pytest.approx(
        sum(float(row[int(a)]) for row, a in zip(logs.detach(), actions, strict=True)), abs=1e-5
    )


def test_factors_are_those_offered_and_depend_on_what_was_chosen_before():
    torch.manual_seed(0)
    policy = ShrinkPolicy()
    drawn = {f for seed in range(30) for f in policy.sample(STATES, [True] * 3, torch.Generator().manual_seed(seed))[0]}
    assert drawn <= set(FACTORS) and len(drawn) > 5
    for factors in ((), (0.0, 1.0), (1.5,)):
        with pytest.raises(UsageError):
            ShrinkPolicy(factors=factors)


def test_the_policy_learns_to_remove_what_costs_reward():
    torch.manual_seed(0)
    policy, generator = RemovalPolicy(), torch.Generator().manual_seed(0)
    learner = Reinforce(list(policy.parameters()), 0.01)
    for _ in range(60):
        logs, rewards = [], []
        for _ in range(4):
            removed, log = policy.sample(STATES, [True] * 3, generator)
            logs.append(log)
            rewards.append(float(removed[1]))
        learner.step(logs, rewards)
    assert policy(STATES).detach().exp()[1, 1] > 0.9


def test_a_search_returns_its_best_student_and_judges_equal_ones_once(teacher, digits):
    choices = N2NSettings(removal_epochs=3, shrink_epochs=2, rollouts=3, student_epochs=0, least=2)
    before = {name: tensor.clone() for name, tensor in teacher.state_dict().items()}
    found = n2n(teacher, digits, choices, train_settings=QUICK, device="cpu")
    example = digits.preprocessing(digits.train.images([0]))
    assert found.best.reward == max(student.reward for student in found.students)
    assert count(found.model, example).parameters == found.best.cost < count(teacher, example).parameters
    plans = [(student.blocks, student.factors) for student in found.students]
    assert len(plans) == len(set(plans)) and len(found.rewards) == 5
    assert all(torch.equal(tensor, before[name]) for name, tensor in teacher.state_dict().items())
    assert found.model(example).shape == (1, 10)
    assert {student.reward for student in found.students if not student.blocks and not student.factors} <= {-1.0}
    again = n2n(teacher, digits, choices, train_settings=QUICK, device="cpu")
    assert again.best == found.best


def test_students_learn_a_budget_holds_and_policies_go_on(teacher, digits):
    choices = N2NSettings(removal_epochs=0, shrink_epochs=1, rollouts=2, student_epochs=1, least=2, inherit=False)
    found = n2n(teacher, digits, choices, train_settings=QUICK, device="cpu")
    assert all(student.factors for student in found.students)
    example = digits.preprocessing(digits.train.images([0]))
    choices = N2NSettings(removal_epochs=0, shrink_epochs=4, rollouts=3, student_epochs=0, least=2)
    tight = n2n(teacher, digits, choices, budget="params<=40%", shrink=found.shrink, device="cpu")
    assert count(tight.model, example).parameters <= 0.4 * count(teacher, example).parameters


def test_a_student_that_keeps_all_is_its_teacher_and_worth_nothing(teacher, digits):
    search = _Search(teacher, digits, N2NSettings(student_epochs=0), None, QUICK, "cpu")
    same = search._judge(((), ()))
    assert same.reward == -1 and same.cost == search.start.parameters and not search.top
    x = digits.preprocessing(digits.train.images([0, 1]))
    assert torch.equal(search._build((), ())(x), teacher(x))


def test_widths_end_at_ten_or_at_what_there_was(teacher, digits):
    search = _Search(teacher, digits, N2NSettings(student_epochs=0), None, QUICK, "cpu")
    example = digits.preprocessing(digits.train.images([0]))
    graph = trace(teacher, example)
    child = search._build((), tuple((group.name, 0.1) for group in graph))
    for before, after in zip(graph, trace(child, example), strict=True):
        assert after.size == min(10, before.size)
    assert child(example).shape == (1, 10)


def test_finalists_are_trained_on_by_the_loss_that_was_asked_for(teacher, digits):
    choices = N2NSettings(
        removal_epochs=0,
        shrink_epochs=1,
        rollouts=3,
        student_epochs=0,
        least=2,
        finalists=2,
        final_epochs=1,
        loss="mse",
    )
    found = n2n(teacher, digits, choices, train_settings=QUICK, device="cpu")
    tried = {student.factors: student for student in found.students}
    assert found.best.factors in tried and found.best != tried[found.best.factors], "it was judged anew"
    example = digits.preprocessing(digits.train.images([0]))
    assert count(found.model, example).parameters == found.best.cost
    for wrong in ({"finalists": 0}, {"final_epochs": 0}, {"label_weight": 2.0}):
        with pytest.raises(UsageError, match="n2n"):
            N2NSettings(**wrong)


def test_what_cannot_be_is_refused(teacher, digits):
    with pytest.raises(UsageError, match="nothing to search"):
        N2NSettings(removal_epochs=0, shrink_epochs=0)
    with pytest.raises(UsageError, match="measured"):
        n2n(teacher, digits, N2NSettings(), budget="latency<=1ms")
    flat = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    with pytest.raises(StructureError, match="no block"):
        n2n(flat, digits, N2NSettings(shrink_epochs=0), device="cpu")
