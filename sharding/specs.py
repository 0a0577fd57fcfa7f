"""Every PartitionSpec of the program, named once, and where parameters lie: in use, and at rest.

Letters: L layers, B batch, T positions, D model, N heads, V value dim, C latent, E experts, F expert hidden. A name's suffix is
the shape it is for.
"""

import math
from typing import Any

import jax
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec as P

from sharding.mesh import AXES

BATCH = AXES  # the axes that split the batch

replicated = P()
tokens_BT = P(BATCH, None)
microbatches_ABT = P(None, BATCH, None)
activations_BTD = P(BATCH, None, None)
heads_BTNV = P(BATCH, None, None, None)
per_request_B = P(BATCH)
logits_BV = P(BATCH, None)
experts_EDF = P("expert", None, None)

GATHERED = "gathered"  # the name under which `jax.checkpoint` knows weights that `gather` made whole


def in_use(path: tuple[Any, ...], ndim: int) -> P:
    """Where a parameter lies while it is multiplied: experts over the expert axis, everything else whole on every device."""
    axes: list[str | None] = [None] * ndim
    if "experts" in _names(path):
        axes[ndim - 3] = "expert"
    return P(*axes)


def keep_all_but_gathered(primitive: Any, *_: Any, **params: Any) -> bool:
    """A policy of `jax.checkpoint`: `save_anything_except_these_names` would keep what is yet to be named, and casts of what is."""
    return primitive.name not in ("reshard", "pvary") and params.get("name") != GATHERED


def _names(path: tuple[Any, ...]) -> list[str]:
    return jax.tree_util.keystr(path, simple=True, separator=".").removesuffix(".value").split(".")


def _stacked(path: tuple[Any, ...]) -> bool:
    """Whether the path, from the model's root, is one of a stack of layers."""
    return len(_names(path)) > 1


def at_rest(path: tuple[Any, ...], shape: tuple[int, ...]) -> P:
    """Where a parameter, its gradient and its optimizer state lie between uses (ZeRO): cut over every mesh axis.

    The axes that the parameter in use leaves free cut its longest dimension that they divide evenly together (so that one
    reduce-scatter brings the gradient there); or else each its own; what none divides stays whole. Layers are never cut apart.
    """
    axes = [() if axis is None else (axis,) for axis in in_use(path, len(shape))]
    mesh = jax.sharding.get_abstract_mesh()
    sizes = [size // math.prod(mesh.shape[name] for name in names) for size, names in zip(shape, axes)]
    free = tuple(axis for axis in AXES if (axis,) not in axes and mesh.shape[axis] > 1)
    for together in (free, *((axis,) for axis in free)):
        cut = math.prod(mesh.shape[axis] for axis in together)
        fits = [dim for dim in range(_stacked(path), len(shape)) if sizes[dim] % cut == 0]
        if fits and not any(set(together) & set(names) for names in axes):
            dim = max(fits, key=lambda dim: sizes[dim])
            sizes[dim] //= cut
            axes[dim] += together
    return P(*(names[0] if len(names) == 1 else names or None for names in axes))


def gather(tree: Any, *, stacks: bool = True) -> Any:
    """Parameters as they are in use. The backward pass scatters the sum of their gradients to where they rest.

    `stacks=False` leaves the stacks of layers as they are, for a scan to gather a layer at a time.
    """

    def whole(path: tuple[Any, ...], w: jax.Array) -> jax.Array:
        spec = in_use(path, w.ndim)
        if jax.typeof(w).sharding.spec == spec or (_stacked(path) and not stacks):
            return w  # without a name, so that nothing is kept twice
        return checkpoint_name(jax.reshard(w, spec), GATHERED)

    return jax.tree.map_with_path(whole, tree)
