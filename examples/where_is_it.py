"""Where a fact of the prompt sits: patching, exact logit attribution, and a page about one prompt.

python examples/where_is_it.py            # writes patching.svg, attribution.svg and report.html
"""

import sys
from pathlib import Path

import ds4jax
from ds4jax import interp
from ds4jax.interp import plots


def main(out: Path) -> None:
    lm = ds4jax.load("nano", context=512, cache_quant=False)
    clean = "Once upon a time there was a girl named Emma. Her mother said,"
    other = clean.replace("Emma", "Lucy")
    emma, lucy = (lm.tokenizer.encode(name)[0] for name in (" Emma", " Lucy"))

    found = interp.patch(lm, clean, other, score=lambda logits: logits[emma] - logits[lucy])
    print(f"Emma over Lucy by {found.clean:.2f} nats in the clean run, {found.corrupted:.2f} in the other")
    print(found.table.round(2))
    plots.save(found.figure(), out / "patching.svg")

    parts = interp.attribute_logits(lm, clean)
    print(f"likeliest next token {lm.tokenizer.decode(parts.targets)!r}: logit {parts.logits[-1, 0]:.3f}")
    for name, part in zip(parts.names, parts.parts[:, -1, 0], strict=True):
        print(f"  {name:20} {part:+.3f}")
    plots.save(parts.figure(), out / "attribution.svg")

    interp.report(lm, clean, out / "report.html")


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "."))
