"""The commands in a few words, and near misses of words, without importing what they need."""

import re
from collections.abc import Iterable
from difflib import get_close_matches

_REFUSED = re.compile(r"[Ee]xpected (.*?)(?:, got|\. Got value:) '?([\w.-]+)'?\s*$", re.M)
DESCRIPTION = "Two-phase training with a global-convergence guarantee."
SUMMARIES = {
    "demo": "Train a small softplus network in two phases on real data and verify its condition.",
    "train": "Train a model in two phases and leave a run folder.",
    "verify": "Prove that [h_X', 1] has rank N over the distinct inputs of a model, and write a "
    "certificate.",
    "doctor": "Say which premises of Theorem 1 hold for a model, its loss and its data, and what "
    "to do.",
    "report": "Write one HTML file about one run folder or several: what ran, what was guaranteed.",
    "reproduce": "Reproduce a table or figure of the paper, at the scale that this machine allows.",
    "download": "Fetch data sets, with their checksums verified, to where every command finds "
    "them.",
}


def nearly(message: str) -> str:
    """`did_you_mean` for the value that a message says came where others were expected."""
    found = _REFUSED.search(message)
    if found is None:
        return ""
    expected, value = found.groups()
    return did_you_mean(value, re.findall(r"[\w-]{2,}", expected))


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """ " (did you mean ...?)" for a word that is nearly a known one, "" otherwise."""
    near = get_close_matches(word, list(known), n=1, cutoff=0.75)
    return f" (did you mean {near[0]}?)" if near else ""
