"""Seconds in which routed tokens go to their experts, or come back from them."""

from __future__ import annotations

import math

from megatron_progressive.cost.cluster import Cluster
from megatron_progressive.models.base import MoE
from megatron_progressive.runtime.layout import Layout


def nodes_of_a_token(moe: MoE, nodes: float) -> float:
    """The expected number of nodes that the experts of one token lie on.

    Args:
        nodes: over how many the experts are divided. Each expert is taken to be as likely as any
            other, and of groups at most ``top_k_groups`` to be chosen, which are a node each where
            there are as many groups as nodes (arXiv 2412.19437, section 2.1.2: node-limited
            routing).
    """
    experts = moe.num_experts
    # none of the token's experts, which differ, is among those of a node
    none = math.prod(
        max(0.0, experts - experts / nodes - taken) / (experts - taken)
        for taken in range(moe.top_k)
    )
    return min(nodes * (1 - none), moe.top_k_groups * max(1.0, nodes / moe.num_groups), nodes)


def all_to_all_seconds(
    moe: MoE, layout: Layout, cluster: Cluster, token_bytes: float, *, deepep: bool
) -> float:
    """The seconds of one all-to-all of a rank's tokens.

    A plain one sends a token once for each of its experts: at the rate of NVLink inside the node,
    at the network's to others. DeepEP sends it once to each node that has some of its experts, to
    the GPU with the same place there, and NVLink takes it on while the network sends: the slower
    one counts (arXiv 2412.19437, section 3.2.2).

    Args:
        token_bytes: the bytes of all tokens that the rank routes, each once.
    """
    span = layout.expert * layout.expert_tensor
    copies = token_bytes * moe.top_k * layout.expert_tensor
    nvlink, network = 1e9 * cluster.nvlink_gb_per_s, 1e9 * cluster.network_gb_per_s
    outside = max(0.0, 1 - cluster.gpus_per_node / span)
    if not deepep:
        inside = 1 - 1 / span - outside
        return copies * (inside / nvlink + outside / network)
    nodes = max(1.0, span / cluster.gpus_per_node)
    sent = token_bytes * nodes_of_a_token(moe, nodes) * outside
    passed = copies * (1 - 1 / min(span, cluster.gpus_per_node))
    return max(sent / network, passed / nvlink)
