"""The wording of documentation, docstrings and messages: phrases that were replaced do not come back."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / name for name in ("README.md", "CHANGELOG.md", "CONTRIBUTING.md")]
PAGES += [*ROOT.glob("docs/**/*.md"), *ROOT.glob("vosops/**/*.py"), ROOT / "_vosops_cli.py"]

REPLACED = {
    r"leads (the |its )?objects?": "tracks objects",
    r"\(yours\)": "bring your own checkpoint",
    r"so many": "this many, that many; every N frames",
    r"weights that is none": "not a weights file",
    r"how it goes": "progress",
    r"is told|are told|unless told|what is told|be told": "receives; unless given; what is reported",
    r"as (it|you|they) likes?": "any",
    r"what makes": "what creates, the loop",
    r"(must be|is|are|be|were) there(?=[,.;:)]|$)": "exists, is available, is present",
    r"of one's own": "its own",
    r"that which": "what",
    r"(where|as) (it|they) lies?": "in place",
    r"what lies": "the contents, what is",
    r"lies? (in(?! \[)|on|beside|there|within)": "is",
    r"(written|made|made them) anew": "reimplemented, recomputed",
    r"(is|are|was|were) at hand": "is available",
    r"in the manner of": "as in",
    r"goes? on (with|from)": "continues",
    r"taken (off|away)": "removed, subtracted",
    r"held against": "compared with",
    r"with what is learned": "with learned terms",
    r"what (went|came) wrong": "the error",
    r"says? nothing of": "does not affect",
    r"for want of": "because no ... was available",
    r"for good(?=[,.;:)]|$)": "permanently",
    r"(started?|starts) .{0,20}afresh": "restart",
    r"held back from": "held out of",
    r"(and|or) its (kin|like)": "and related models, and similar files",
    r"a process of (its|their) own": "a separate process",
    r"what you train": "your own training",
    r"what is held (is|are)": "the network stores",
    r"(?<!\w)and says so": "prints a message, warns",
    r"too many or of another shape": "unexpected or has the wrong shape",
    r"what helped|what did not help": "successful, unsuccessful optimisations",
}
"""Pattern of a phrase -> what to write instead."""

ANY = re.compile("|".join(rf"\b(?:{p})(?!\w)" if p[0] != "\\" else p for p in REPLACED), re.IGNORECASE)


@pytest.mark.parametrize(
    "phrase",
    [
        "told where it lies in memory",
        "is told of stages",
        "every so many frames",
        "each runs in a process of its own",
        "what is held are two maps",
    ],
)
def test_the_patterns_find_what_they_replace(phrase):
    assert ANY.search(phrase)


def test_replaced_phrases_do_not_come_back():
    found = [
        f"{page.relative_to(ROOT)}:{number}: {match[0]!r}"
        for page in PAGES
        for number, line in enumerate(page.read_text(encoding="utf-8").splitlines(), 1)
        for match in [ANY.search(line)]
        if match
    ]
    assert not found, "see REPLACED for what to write instead:\n" + "\n".join(found)
