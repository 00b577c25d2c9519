"""How an answer is scored: 0 is wrong, 1 is right.

`exact_match`, `token_f1`, `contains` and `hotpotqa` are for any question with short answers. `locomo` and
`memory_agent_bench` give the scores that those benchmarks' own evaluation code gives, quirks included: they
are made to be compared with published numbers. `confidence_interval` says how far a mean of scores can be
trusted.

Where a question has several acceptable answers, the best score counts. The two benchmarks and their libraries
(nltk, rouge-score, rapidfuzz) are an extra: `pip install -e ".[eval]"`; the rest needs only numpy.
"""

from __future__ import annotations

import functools
import importlib
import re
import string
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from types import ModuleType

import numpy as np

PUNCTUATION = str.maketrans("", "", string.punctuation)
RESAMPLES = 10_000
Z_95 = 1.959963984540054  # a normal variable is within this many standard deviations 95 % of the time


# ---- short answers -------------------------------------------------------------------------------


def normalize(text: str) -> str:
    """SQuAD's normal form: lower case, no ASCII punctuation, no articles, single spaces."""
    return _normalize(text, "a|an|the")


def exact_match(answers: str | Sequence[str], prediction: str) -> float:
    """1 where the prediction and an answer have the same normal form.

    Raises:
        TypeError: An answer or the prediction is not a string.
        ValueError: There is no answer.
    """
    return _best(_equal, answers, prediction)


def token_f1(answers: str | Sequence[str], prediction: str) -> float:
    """The F1 of the words that the prediction's normal form shares with an answer's (SQuAD).

    It is 0 where either has no word left.

    Raises:
        TypeError: An answer or the prediction is not a string.
        ValueError: There is no answer.
    """
    return _best(lambda answer, text: _f1(normalize(answer), normalize(text)), answers, prediction)


def contains(answers: str | Sequence[str], prediction: str) -> float:
    """1 where an answer stands in the prediction as whole words, both in normal form.

    Raises:
        TypeError: An answer or the prediction is not a string.
        ValueError: There is no answer, or nothing of one is left in normal form.
    """
    return _best(_contains, answers, prediction)


def hotpotqa(answer: str, prediction: str) -> dict[str, float]:
    """HotpotQA's answer scores: `em`, the exact match, and `f1`.

    The F1 is that of `token_f1`, but a "yes", "no" or "noanswer" shares nothing with a longer text.

    Raises:
        TypeError: The answer or the prediction is not a string.
    """
    return {"em": exact_match(answer, prediction), "f1": _best(_strict_f1, answer, prediction)}


def _normalize(text: str, articles: str) -> str:
    text = text.lower().translate(PUNCTUATION)
    return " ".join(re.sub(rf"\b({articles})\b", " ", text).split())


def _best(score: Callable[[str, str], float], answers: str | Sequence[str], prediction: str) -> float:
    return max(float(score(answer, _string(prediction))) for answer in _acceptable(answers))


def _acceptable(answers: str | Sequence[str]) -> list[str]:
    answers = [answers] if isinstance(answers, str) else answers
    if not isinstance(answers, Sequence) or not all(isinstance(answer, str) for answer in answers):
        raise TypeError(f"answers must be a string or a list of strings, got {answers!r}")
    if not answers:
        raise ValueError("a question needs at least one answer, got an empty list")
    return list(answers)


def _string(prediction: str) -> str:
    if not isinstance(prediction, str):
        raise TypeError(f"the prediction must be a string, got {prediction!r}")
    return prediction


def _equal(answer: str, prediction: str) -> bool:
    return normalize(answer) == normalize(prediction)


def _contains(answer: str, prediction: str) -> bool:
    words = normalize(answer)
    if not words:
        raise ValueError(f"nothing of the answer {answer!r} is left without punctuation and articles")
    return f" {words} " in f" {normalize(prediction)} "


def _f1(answer: str, prediction: str) -> float:
    expected, words = answer.split(), prediction.split()
    shared = (Counter(expected) & Counter(words)).total()
    return 2 * shared / (len(expected) + len(words)) if shared else 0.0


def _strict_f1(answer: str, prediction: str) -> float:
    answer, prediction = normalize(answer), normalize(prediction)
    if answer != prediction and {answer, prediction} & {"yes", "no", "noanswer"}:
        return 0.0
    return _f1(answer, prediction)


# ---- LoCoMo --------------------------------------------------------------------------------------


def locomo(category: int, answer: str | int | None, prediction: str) -> float:
    """The score that LoCoMo's own evaluation gives (Maharana et al., arXiv 2402.17753).

    - 1, several hops: answer and prediction are lists with commas; each item of the answer takes its best F1
      among the predicted ones, and their mean counts. All F1 here are of stemmed words.
    - 2, time, and 4, one hop: the F1.
    - 3, open domain: the F1 with what stands before the answer's first ";".
    - 5, adversarial: 1 where the prediction says "no information available" or "not mentioned", else 0. The
      answer is the trap, which does not count; it may be None.

    Raises:
        ImportError: nltk is missing.
        TypeError: The answer is neither a string nor a number, or the prediction is not a string.
        ValueError: `category` is not 1 to 5.
    """
    if category not in (1, 2, 3, 4, 5):
        raise ValueError(f"LoCoMo's categories are 1 to 5, got {category!r}")
    said = _string(prediction)
    if category == 5:
        said = said.lower()
        return float("no information available" in said or "not mentioned" in said)
    if not isinstance(answer, str | int):  # in the data, years and counts are numbers
        raise TypeError(f"the answer must be a string or a number, got {answer!r}")
    expected = str(answer)
    if category == 1:
        items = [_stems(item) for item in said.split(",")]
        return float(np.mean([max(_f1(_stems(e), item) for item in items) for e in expected.split(",")]))
    if category == 3:
        expected = expected.split(";")[0]
    return _f1(_stems(expected), _stems(said))


def _stems(text: str) -> str:
    # Unlike SQuAD's, this normal form has no "and" either.
    return " ".join(map(_stemmer().stem, _normalize(text, "a|an|the|and").split()))


@functools.cache
def _stemmer():
    return _extra("nltk.stem").PorterStemmer()


def _extra(module: str) -> ModuleType:
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise ImportError(f'this score needs {error.name}: pip install -e ".[eval]"') from error


# ---- MemoryAgentBench ----------------------------------------------------------------------------

# The published dataset's sources begin with one of these; beside it the metric that the benchmark's paper
# reports. For LongMemEval and the summaries that is a large model's judgement: here stands the nearest metric
# that can be computed.
MAIN_METRICS = {
    "ruler_qa": "substring_exact_match",
    "longmemeval": "substring_exact_match",
    "eventqa": "eventqa_recall",
    "icl": "exact_match",
    "recsys": "recsys_recall@5",
    "infbench_sum": "rougeLsum_f1",
    "detective_qa": "exact_match",
    "factconsolidation": "substring_exact_match",
}


def main_metric(source: str) -> str:
    """Which of `memory_agent_bench`'s metrics speaks for a source in a table.

    Raises:
        ValueError: The published dataset has no such source.
    """
    return MAIN_METRICS[family(source)]


def memory_agent_bench(
    source: str, answers: str | Sequence[str], prediction: str, movies: Mapping[str, int] | None = None
) -> dict[str, float]:
    """The scores, by metric, that MemoryAgentBench's own evaluation gives (Hu et al., arXiv 2507.05257).

    `source` is a row's `metadata.source`. The metrics are `exact_match`, `f1`, `substring_exact_match`,
    `rougeL_f1`, `rougeL_recall`, `rougeLsum_f1` and `rougeLsum_recall`, each the better one of the whole
    prediction's and its answer line's: what follows the first "Answer:", else the first line. But:

    - `icl_*`: only the answer line is looked at.
    - `eventqa_*`: likewise; and `eventqa_recall` is 1 where the whole prediction has every answer in it,
      letter by letter but for case.
    - `recsys_*`: only `recsys_recall@1`, `@5` and `@10`. The answers are ids of movies, the prediction is a
      numbered list of titles, one a line; each is taken for the nearest title in `movies`, which is what the
      benchmark's `entity2id.json` holds.

    Raises:
        ImportError: A library of the `eval` extra is missing.
        TypeError: An answer or the prediction is not a string.
        ValueError: The published dataset has no such source; there is no answer; a `recsys_*` source without
            `movies`, or an answer of it that is no id in them.
    """
    kind, expected, line = family(source), _acceptable(answers), _answer_line(_string(prediction))
    if kind == "recsys":
        return _movie_recall(expected, prediction, movies)
    scores = _text_scores(expected, line)
    if kind == "eventqa":
        said = prediction.lower()
        return {**scores, "eventqa_recall": float(all(answer.lower() in said for answer in expected))}
    if kind == "icl":
        return scores
    whole = _text_scores(expected, prediction)
    return {metric: max(score, whole[metric]) for metric, score in scores.items()}


def family(source: str) -> str:
    """The one of the benchmark's kinds of sources that a source is of: what its name begins with.

    Raises:
        ValueError: The published dataset has no such source.
    """
    for beginning in MAIN_METRICS:
        if source.startswith(beginning):
            return beginning
    raise ValueError(
        f"MemoryAgentBench has no source {source!r}; its sources begin with {', '.join(MAIN_METRICS)}"
    )


def _answer_line(prediction: str) -> str:
    found = re.search("answer:(.*)", prediction, re.IGNORECASE) or re.match("(.*)", prediction)
    return re.sub("^answer:", "", found[1].strip(), flags=re.IGNORECASE).strip()


def _text_scores(answers: list[str], prediction: str) -> dict[str, float]:
    rouge = [_rouge().score(answer, prediction) for answer in answers]
    scores = {
        "exact_match": _best(_equal, answers, prediction),
        "f1": _best(_strict_f1, answers, prediction),
        # Unlike `contains`, parts of words count, and an answer that is all article is in every prediction.
        "substring_exact_match": _best(lambda a, p: normalize(a) in normalize(p), answers, prediction),
    }
    for kind in ("rougeL", "rougeLsum"):
        scores[f"{kind}_f1"] = float(max(score[kind].fmeasure for score in rouge))
        scores[f"{kind}_recall"] = float(max(score[kind].recall for score in rouge))
    return scores


@functools.cache
def _rouge():
    return _extra("rouge_score.rouge_scorer").RougeScorer(["rougeL", "rougeLsum"], use_stemmer=True)


def _movie_recall(answers: list[str], prediction: str, movies: Mapping[str, int] | None) -> dict[str, float]:
    if not movies:
        raise ValueError("recsys answers are movie ids: give movies, the benchmark's entity2id.json")
    titles = {number: _title(name) for name, number in movies.items()}
    try:
        expected = [titles[int(answer)] for answer in answers]
    except (KeyError, ValueError) as error:
        raise ValueError(f"recsys answers must be ids in movies, got {answers!r}") from error
    # Lines before "1." are talk. Without it commas separate; empty lines count, as they do there.
    _, numbered, listed = prediction.partition("1.")
    lines = (listed if numbered else prediction.replace(",", "\n")).split("\n")
    process, distance = _extra("rapidfuzz.process"), _extra("rapidfuzz.distance").Levenshtein.distance
    candidates = list(titles.values())
    lowered = [title.lower() for title in candidates]
    recommended = [
        # Of equally near titles the benchmark takes any; here it is the first in `movies`.
        candidates[process.extractOne(_recommended(line).lower(), lowered, scorer=distance)[2]]
        for line in lines[:10]
    ]
    return {
        f"recsys_recall@{k}": sum(title in recommended[:k] for title in expected) / len(expected)
        for k in (1, 5, 10)
    }


@functools.cache  # a question is compared with all of some 30,000 movies
def _title(name: str) -> str:
    """The title in a name of `entity2id.json`, a DBpedia address such as `<…/Alien_(film)>`."""
    name = re.sub("[_>-]", " ", name.split("/")[-1])
    return " ".join(re.sub(r"\([^()]*\)", "", name).split())


def _recommended(line: str) -> str:
    """A recommended title without what is in brackets and without its number: "2. Alien (1979)" is Alien."""
    line = re.sub(r"\([^()]*\)", "", line.strip())
    return " ".join(re.sub(r"^\d+[.)、]?\s*[-—–]?\s*", "", line).split())


# ---- how sure ------------------------------------------------------------------------------------


def confidence_interval(scores: Sequence[float], seed: int = 0) -> tuple[float, float]:
    """The 95 % interval of the mean of scores between 0 and 1, from bootstrap resamples of them.

    The order of the scores does not matter. Where all are 0, or all 1, resampling sees no spread; Wilson's
    interval for a proportion then takes its place.

    Raises:
        ValueError: There is no score, or one is not between 0 and 1.
    """
    values = np.sort(np.asarray(scores, dtype=np.float64))
    count = len(values)
    if not count:
        raise ValueError("a confidence interval needs at least one score")
    # Sorted, the first is the smallest and the last the largest or, if there is one, NaN.
    if not (values[0] >= 0 and values[-1] <= 1):
        raise ValueError(f"scores must be between 0 and 1, got some from {values[0]} to {values[-1]}")
    margin = Z_95**2 / (count + Z_95**2)
    if values[-1] == 0:
        return 0.0, margin
    if values[0] == 1:
        return 1 - margin, 1.0
    random = np.random.default_rng(seed)
    means = [values[random.integers(count, size=count)].mean() for _ in range(RESAMPLES)]
    low, high = np.quantile(means, (0.025, 0.975))
    return float(low), float(high)
