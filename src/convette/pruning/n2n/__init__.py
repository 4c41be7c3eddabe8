"""N2N: two policies read a network layer by layer; one removes layers, one shrinks what is left (arXiv 1709.06030).

N2N Learning: Network to Network Compression via Policy Gradient Reinforcement Learning, A. Ashok and others, ICLR 2018.
`search` runs both stages on any traced network: what may go and by how much is asked of the channel graph, instead of
the paper's rules about shortcuts. `policies` holds the two recurrent networks, `rewards` what a student is worth.
"""

from convette.pruning.n2n.policies import FACTORS, RemovalPolicy, ShrinkPolicy, layer_states
from convette.pruning.n2n.rewards import compression_reward, constrained_reward, student_reward
from convette.pruning.n2n.search import N2NResult, N2NSettings, Student, n2n

__all__ = [
    "FACTORS",
    "N2NResult",
    "N2NSettings",
    "RemovalPolicy",
    "ShrinkPolicy",
    "Student",
    "compression_reward",
    "constrained_reward",
    "layer_states",
    "n2n",
    "student_reward",
]
