"""Read activations: in one pass, while generating, and to disk; then a small probe on them.

python examples/read_activations.py
"""

import sys
import tempfile

import numpy as np

import ds4jax

STORIES = """Once upon a time there was a
One day, a little girl went to
The old man lived in a small
Tom and Emma ran to""".splitlines()
MANUALS = """The server reads the file
This option sets the size of
The function returns a list
Click the button to""".splitlines()


def main() -> None:
    lm = ds4jax.load("nano", context=512)

    acts = lm.capture("Once upon a time", ["layers.*.ffn_out", "layers.3.router.experts"])
    for site in ("layers.0.ffn_out", "layers.3.router.experts"):
        print(site, acts[site].shape)

    out = lm.generate("Once upon a time", max_tokens=12, temperature=0, capture="layers.2.attn_out")
    print(repr(out.text), out.captured["layers.2.attn_out"].shape)

    with tempfile.TemporaryDirectory() as folder:
        done = lm.capture(STORIES + MANUALS, "layers.*.ffn_out", reduce="mean", out=folder)
        print(done)
        for site in done.sites:  # the first pair of each kind fits a direction, the others test it
            x = done.site(site)
            v = x[:2].mean(0) - x[4:6].mean(0)
            middle = (x[:2].mean(0) + x[4:6].mean(0)) @ v / 2
            right = np.concatenate([x[2:4] @ v > middle, x[6:] @ v < middle]).mean()
            print(f"{site}: story or manual told apart in {right:.0%} of new prompts")


if __name__ == "__main__":
    sys.exit(main())
