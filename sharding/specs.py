"""Every PartitionSpec of the program, named once.

Letters: L layers, B batch, T positions, D model, C latent, E experts, F expert hidden. A name's suffix is the shape it is for.
"""

from jax.sharding import PartitionSpec as P

BATCH = ("data", "expert")  # the axes that split the batch

replicated = P()
tokens_BT = P(BATCH, None)
activations_BTD = P(BATCH, None, None)
per_request_B = P(BATCH)
logits_BV = P(BATCH, None)
experts_EDF = P("expert", None, None)
cache_LBSC = P(None, BATCH, None, None)
