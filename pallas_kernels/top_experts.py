"""The experts with the largest logits, of the best groups only where groups are limited (paper section 2.2.2), and their affinities.

Letters: P parts, N tokens, D model, E experts, G groups, K experts a token.
"""

import jax
import jax.numpy as jnp

from pallas_kernels import top_experts_hopper
from pallas_kernels.dispatch import choose
from pallas_kernels.lanes import LANES

FEW = 1024  # tokens; of more, XLA's program is not what anything waits for
PARTS = 8


def parts(tokens: int, depth: int, *limits: int, inference: bool) -> int:
    """In how many parts along D, its `depth`, to make the router's product of a device's tokens: their sum is the logits.

    PARTS where `top_experts`, with these `limits` (experts, choices, groups, top_groups), is the Hopper kernel, which adds them up: a
    product of few rows over all of D runs on one or a few SMs (8 rows over 2048: 6 to 11 us on an H200).
    """
    kernel = choose(None, unsupported(tokens, *limits, inference=inference)) == "pallas"
    return PARTS if kernel and depth % PARTS == 0 else 1


def top_experts(
    logits_PNE: jax.Array,
    slots_N: jax.Array | None,
    choices: int,
    groups: int = 1,
    top_groups: int = 1,
    implementation: str | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Each token's experts int32 [N, K], in order of falling affinity, and their affinities float32 [N, K], the softmax over all experts.

    Of equal experts the first ones are taken. Logits that are not finite are ranked as `jnp.nan_to_num` makes them: ids always differ.

    Args:
        logits_PNE: float32, parts whose sum is the logits.
        slots_N: of inference: where the cache keeps a token, int32; one below 0 only fills up the batch, and has the id E, no expert.
        choices: K; at most as many as the experts of `top_groups` groups.
        groups, top_groups: experts are taken of the `top_groups` groups alone that have the largest maximum.

    Raises: ValueError, if the implementation is "pallas" and cannot run, with the reason.
    """
    limits = logits_PNE.shape[2], choices, groups, top_groups
    if choose(implementation, unsupported(logits_PNE.shape[1], *limits, inference=slots_N is not None)) == "pallas":
        return top_experts_hopper.top_experts(logits_PNE, slots_N, choices, groups, top_groups)
    logits_NE = logits_PNE.sum(axis=0)
    # Logits have the order of scores, and do not underflow; finite, all of them differ from the -inf of what is not allowed.
    allowed_NE = jnp.nan_to_num(jax.lax.stop_gradient(logits_NE))
    if groups > 1:
        grouped_NGX = allowed_NE.reshape(len(allowed_NE), groups, -1)
        chosen_NG = jax.nn.one_hot(_largest(grouped_NGX.max(axis=-1), top_groups), groups, dtype=bool).any(axis=-2)
        allowed_NE = jnp.where(chosen_NG[..., None], grouped_NGX, -jnp.inf).reshape(logits_NE.shape)
    ids_NK = _largest(allowed_NE, choices)
    # By a sum, whose gradient, unlike that of a look-up, adds nothing up in an order that changes from run to run.
    one_hot_NKE = jax.nn.one_hot(ids_NK, logits_NE.shape[1])
    affinities_NK = (jax.nn.softmax(logits_NE, axis=-1)[:, None] * one_hot_NKE).sum(axis=-1)
    if slots_N is not None:
        ids_NK = jnp.where(slots_N[:, None] < 0, logits_NE.shape[1], ids_NK)
    return ids_NK, affinities_NK


def unsupported(tokens: int, experts: int, choices: int, groups: int, top_groups: int, *, inference: bool) -> str | None:
    """Why the Hopper kernel cannot take so much; None if it can."""
    if not inference:
        return "there are no slots: the kernel is for inference, and has no gradient"
    if not 0 < tokens <= FEW:
        return f"there are {tokens} tokens, expected 1 to {FEW}"
    if experts > 256:
        return f"there are {experts} experts, expected 256 or fewer"
    if groups > LANES or experts % groups:
        return f"there are {groups} groups of {experts} experts, expected a divisor, {LANES} at most"
    if choices > min(LANES, experts // groups * top_groups):
        return f"{choices} experts are to be chosen, expected {LANES} at most, and no more than {top_groups} groups have"
    return None


def _largest(values_NE: jax.Array, k: int) -> jax.Array:
    """Where the k largest of numbers are, in falling order, the first of equal ones first: the indices of `jax.lax.top_k`.

    All compared with all is a small program on a GPU, where top_k sorts.
    """
    index_E = jnp.arange(values_NE.shape[1], dtype=jnp.int32)
    one, other = values_NE[:, :, None], values_NE[:, None]
    rank_NE = ((other > one) | (other == one) & (index_E < index_E[:, None])).sum(axis=-1, dtype=jnp.int32)
    at_rank_NKE = rank_NE[:, None] == jnp.arange(k, dtype=jnp.int32)[:, None]
    return jnp.where(at_rank_NKE, index_E, 0).sum(axis=-1, dtype=jnp.int32)
