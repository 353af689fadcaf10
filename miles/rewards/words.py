"""Overlap of words (`--rm-type f1`): the F1 score of question answering.

Source: the evaluation of SQuAD (Rajpurkar et al., arXiv 1606.05250): lower case, without punctuation and
articles; multisets of words.
"""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Sequence

from miles.data.sample import Sample
from miles.rewards.outcome import Outcome

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)
VERDICTS = ({"yes"}, {"no"}, {"noanswer"})
"""Answers of one word that are right or wrong, with nothing in between."""


async def words_f1(samples: Sequence[Sample]) -> list[Outcome]:
    """The harmonic mean of precision and recall of the response's words against the label's."""
    return [f1(sample.response, sample.label or "") for sample in samples]


def f1(response: str, label: str) -> float:
    """0.0 to 1.0; 0.0 where no word is shared."""
    given, wanted = _words(response), _words(label)
    if given != wanted and (set(given) in VERDICTS or set(wanted) in VERDICTS):
        return 0.0
    shared = sum((Counter(given) & Counter(wanted)).values())
    return 2 * shared / (len(given) + len(wanted)) if shared else 0.0


def _words(text: str) -> list[str]:
    return _ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split()
