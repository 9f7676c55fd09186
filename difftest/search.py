"""The search for inputs on which a compressed model deviates from its original.

Tian et al., TOSEM 2023, section 3. Variants: "paper" and "released" (its code, from which the
published numbers come) are the walks of ``walk.py``; "best" is ours (``lines.py``).
"""

import os
from functools import partial
from typing import Any

import jax
import numpy as np

from difftest import device, lines, lockstep
from difftest.confirm import same_answers
from difftest.keeping import Keeping
from difftest.options import require_max_l2, require_one_of, require_timeout, require_whole
from difftest.pair import ModelPair
from difftest.result import SearchResult
from difftest.seeds import checked_key, checked_seeds, labelled
from difftest.select import RULES
from difftest.walk import VARIANTS
from nnslicer_jax.checkpoint import digest


def search(
    pair: ModelPair,
    seeds: np.ndarray,
    key: jax.Array,
    *,
    variant: str = "released",
    novelty: bool = True,
    selection: str | None = None,
    keep_label: bool = False,
    max_l2: float | None = None,
    max_queries: int = 10_000,
    timeout: float = 180.0,
    batch_size: int = 128,
    checkpoint: str | os.PathLike[str] | None = None,
) -> SearchResult:
    """Searches, from each seed, an input that the two models label differently.

    A query is one image through both models; the seed's own is not counted. A pair of
    ``jax_model``s is searched on the device.

    Args:
        pair: the models.
        seeds: uint8 ``[N, H, W, C]``, height and width at least 8.
        key: of JAX's default generator, threefry; seed n draws with ``fold_in(key, n)``: what is
            found for it depends on no other seed (but for "best", which goes towards others).
        variant: "released", "paper" or "best".
        novelty: False is the ablation DFlare_D: a mutant must raise D.
        selection: how operators are chosen: "metropolis", "ranked", or "uniform", which is the
            ablation DFlare_R; None: as the variant does.
        keep_label: only inputs count that the original model gives the seed's label.
        max_l2: largest distance from the seed on the 0-1 scale; None: any.
        max_queries: of one seed.
        timeout: seconds of one seed: its share of the time of the batches that it was in, but
            for the first batch of each size, in which programs are compiled.
        batch_size: seeds searched at a time.
        checkpoint: a file; finished seeds are kept there, and a search that was ended begins with
            those.

    Returns:
        One row a seed.

    Raises:
        ValueError: seeds or an option are not accepted, or the checkpoint is another search's.
        ModelError: the models fail on every seed.
    """
    require_one_of("variant", variant, VARIANTS)
    require_one_of("selection", selection, RULES, none=True)
    require_whole("max_queries", max_queries, 1)
    require_whole("batch_size", batch_size, 1)
    require_timeout(timeout)
    require_max_l2(max_l2)
    seeds, key = checked_seeds(seeds), checked_key(key)
    settings = {
        "novelty": bool(novelty),
        "selection": selection,
        "keep_label": bool(keep_label),
        "max_l2": None if max_l2 is None else float(max_l2),
        "max_queries": int(max_queries),
        "timeout": float(timeout),
        "key": np.asarray(jax.random.key_data(key)).tolist(),
    }
    rows = labelled(pair, seeds, variant, settings, batch_size)
    rows.settings["seeds"] = digest([seeds, rows.seed_labels])
    answers = np.stack([rows.outputs_original, rows.outputs_compressed])
    rules = VARIANTS[variant]
    rules = rules._replace(
        either=rules.either and bool(novelty),
        novelty=bool(novelty),
        keep_label=bool(keep_label),
        max_l2=settings["max_l2"],
    )
    if selection is not None:
        rules = rules._replace(selection=selection)
    options: dict[str, Any] = {
        "max_queries": max_queries,
        "timeout": timeout,
        "batch_size": batch_size,
    }
    with Keeping(checkpoint, rows, partial(same_answers, pair)) as keep:
        if variant == "best":
            lines.run(pair, seeds, rules, rows, answers, save=keep, **options)
        # What the lines have left over, walks.
        waiting = np.flatnonzero(rows.status == "waiting")
        run = device.run if pair.on_device else lockstep.run
        run(pair, seeds, key, rules, rows, waiting, save=keep, **options)
    return rows
