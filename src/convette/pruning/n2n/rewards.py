"""What a student is worth: accuracy times compression, and less where it breaks a constraint."""

from convette.errors import UsageError


def compression_reward(student: float | int, teacher: float | int) -> float:
    r"""Return :math:`R_c = C (2 - C)` with :math:`C = 1 - student / teacher`, of a cost (parameters, MACs, ms).

    Concave: the first half is worth three quarters. A student as costly as its teacher is worth 0, a costlier one less.
    """
    if teacher <= 0:
        raise UsageError(f"n2n: a teacher's cost of {teacher} cannot be compressed.")
    saved = 1 - student / teacher
    return saved * (2 - saved)


def student_reward(accuracy: float, teacher_accuracy: float, cost: float | int, teacher_cost: float | int) -> float:
    r"""Return :math:`R = \frac{acc_s}{acc_t}\, R_c`."""
    return accuracy / max(teacher_accuracy, 1e-12) * compression_reward(cost, teacher_cost)


def constrained_reward(reward: float, met: bool, epoch: int, horizon: int = 15) -> float:
    r"""Return `reward` where the constraints are `met`, else :math:`(\epsilon_e - 1) + \epsilon_e R`.

    :math:`\epsilon_e = \mathrm{clip}((1 - e / horizon)^4, 0, 1)`: a broken constraint is forgiven at first, and costs
    all (-1) from epoch `horizon` on.
    """
    if met:
        return reward
    forgiven = min(1.0, max(0.0, 1 - epoch / horizon) ** 4)
    return (forgiven - 1) + forgiven * reward
