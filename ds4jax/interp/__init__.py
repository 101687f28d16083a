"""Look inside and change what is there: sites, capture, interventions, directions, steering, reading aids."""

from ds4jax.interp.aids import (
    attribute_logits,
    expert_use,
    gradients,
    indexer_map,
    logit_lens,
    patch,
    report,
)
from ds4jax.interp.build import Sweep, build_directions, sweep
from ds4jax.interp.capture import Reading
from ds4jax.interp.directions import Directions
from ds4jax.interp.interventions import (
    POLICIES,
    Intervention,
    When,
    add,
    apply,
    clamp,
    pin,
    project,
    replace,
    scale,
)
from ds4jax.interp.steering import Steering
from ds4jax.interp.store import CaptureSet
from ds4jax.interp.store import CaptureSet as open_capture
from ds4jax.model import Site, match_sites, site_table


def sites(lm, pattern: str = "**") -> list[Site]:
    """The sites of a model that a name or glob stands for, in the order in which a pass reaches them."""
    return match_sites(pattern, lm.config)


__all__ = [
    "POLICIES",
    "CaptureSet",
    "Directions",
    "Intervention",
    "Reading",
    "Site",
    "Steering",
    "Sweep",
    "When",
    "add",
    "apply",
    "attribute_logits",
    "build_directions",
    "clamp",
    "expert_use",
    "gradients",
    "indexer_map",
    "logit_lens",
    "match_sites",
    "open_capture",
    "patch",
    "pin",
    "project",
    "replace",
    "report",
    "scale",
    "site_table",
    "sites",
    "sweep",
]
