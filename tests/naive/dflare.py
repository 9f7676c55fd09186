"""Algorithm 1 of the DFlare paper for one seed, one step after the other, lists and loops.

Random choices are made with the project's keys, so that the same walk must come out.
"""

import jax
import jax.numpy as jnp
import numpy as np

from difftest import mutate, select

_DRAW = jax.jit(select.draw, static_argnums=2)
_MUTATE = jax.jit(mutate.mutate, static_argnums=0)


def search(pair, seed, key, variant, max_queries, *, novelty=True, selection=None):
    """Queries and trigger (or None) of one seed."""
    released = variant == "released"
    rule = selection or ("ranked" if released else "metropolis")
    table = "released" if released else "clean"
    tried, succeeded, last = [0] * 7, [0] * 7, -1
    first = [outputs[0] for outputs in pair.probabilities(seed[None])]
    seen = [np.concatenate(first)]
    best = 0.0 if released else abs(float(first[0].max()) - float(first[1].max()))
    image = seed
    for query in range(max_queries):
        key_operator, key_mutation = jax.random.split(jax.random.fold_in(key, query))
        state = select.SelectState(jnp.int32(last), jnp.array(tried), jnp.array(succeeded))
        operator = int(_DRAW(key_operator, state, rule))
        mutant = np.asarray(_MUTATE(table, jnp.int32(operator), key_mutation, image))
        original, compressed = (outputs[0] for outputs in pair.probabilities(mutant[None]))
        tried[operator] += 1
        if not released:
            last = operator
        if original.argmax() != compressed.argmax():
            return query + 1, mutant
        fitness = abs(float(original.max()) - float(compressed.max()))
        vector = np.concatenate([original, compressed])
        new = all(((vector - other) ** 2).sum() > 0.5 for other in seen)
        if new:
            seen.append(vector)
        gain = fitness - best
        if released:
            # DFlare_D, as the text has it: D must rise.
            accept = (abs(gain) > 1e-3 or new) if novelty else gain > 1e-3
        else:
            accept = gain > 1e-3 or (novelty and new and abs(gain) <= 1e-3)
        if accept:
            image, best = mutant, fitness
            succeeded[operator] += 1
            if released:
                last = operator
    return max_queries, None
