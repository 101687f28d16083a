"""Build a direction from two registers of nano's training text, scripture and software manuals, and sweep over it.

    python examples/steer_style.py            # writes steer_style.svg and steer_style.html

About two minutes on two CPU cores.
"""

import re
import sys
from pathlib import Path

import ds4jax
from ds4jax import interp

SCRIPTURE = """\
And the LORD spoke to Moses, saying, Speak to the children of Israel
In those days there was no king in Israel; every man did that which was right
The word of the LORD came to the prophet, saying, Son of man
Blessed is the man who walks not in the counsel of the wicked
And it happened in the morning that the king arose and went
Praise the LORD, O my soul, and all that is within me
Then Jesus said to his disciples, Most certainly I tell you
The sons of Levi: Gershon, Kohath, and Merari
Behold, the days come, says the LORD, that I will send
He made the altar of burnt offering of acacia wood
Give thanks to the LORD, for he is good; his mercy endures
Now there was a famine in the land, and Abram went down""".splitlines()

MANUALS = """\
The server reads its configuration file when it starts, and the option
If the argument is omitted, the function returns the default value
To install the package, run the following command as root
The index is used by the query planner when the column
This module provides functions for reading and writing files
The default value of this parameter is the size of the buffer
Click the button to open the dialog and select the file
A process that waits for a lock on a table can be
The directive specifies the number of threads the server
When the database is opened, the library checks the format
The method returns a list of strings, one for each line
The branch is merged into the current one, and the commit""".splitlines()

PROMPTS = ["After that, the", "It is said that", "There is a", "When he came to the", "In this case the", "One of the",
           "The first of these is", "And then the", "They do not"]  # fmt: skip

HOLY = set(
    """
lord god unto israel king sons children people shall behold holy priests jerusalem moses david
heaven altar offering son father land earth blessed servants judah egypt prophet righteousness jesus
sins sword congregation
""".split()
)
SOFTWARE = set(
    """
file files function command server value option options default list name table data user system
directory set used use configuration module object type string version package program database
query argument parameter returns method class line output input index button menu window specified
""".split()
)


def register(text: str) -> float:
    """Words of scripture minus words of manuals, per 100."""
    found = re.findall(r"[a-z]+", text.lower())
    return 100 * (sum(w in HOLY for w in found) - sum(w in SOFTWARE for w in found)) / max(1, len(found))


def main(out: Path) -> None:
    lm = ds4jax.load("nano", context=512)
    directions = interp.build_directions(lm, SCRIPTURE, MANUALS, site="layers.{1-4}.streams_out", position="mean")
    for site, score in directions.info["separation"].items():
        print(f"{site}: AUC {score['auc']}, distance of the means {score['gap']} standard deviations")
    directions.save(out / "scripture.gguf")  # llama.cpp reads it too

    steering = ds4jax.Steering.load(out / "scripture.gguf")
    result = interp.sweep(
        lm, steering, PROMPTS, [-6, -4, -2, 0, 2, 4], measures={"scripture − manual words per 100": register},
        max_tokens=48,
    )  # fmt: skip
    for line in result.table():
        print("\t".join(line))
    for scale in result.scales:
        print(f"{scale:+g}", next(r["text"] for r in result.rows if r["scale"] == scale).replace("\n", " "))
    result.save(out / "steer_style.svg")
    result.save(out / "steer_style.html")


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "."))
