"""Scores equal the official evaluation code's, and the general ones are what their papers say."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest

from delta_mem.evaluation import scoring

GOLDEN = Path(__file__).parent / "golden" / "scoring"
MOVIES = {
    "<http://dbpedia.org/resource/Alien_(film)>": 0,
    "<http://dbpedia.org/resource/Aliens_(film)>": 1,
    "<http://dbpedia.org/resource/Up_(2009_film)>": 2,
    "<http://dbpedia.org/resource/Spider-Man_(2002_film)>": 3,
    "<http://dbpedia.org/resource/Heat_(1995_film)>": 4,
    "<http://dbpedia.org/resource/Toy_Story>": 5,
}


def rows(file, key):
    """One test per value of `key`, each with all its rows."""
    groups = {}
    for line in (GOLDEN / file).read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        groups.setdefault(row[key], []).append(row)
    return [pytest.param(groups[name], id=f"{name}-{len(groups[name])}") for name in sorted(groups)]


# ---- the official scores -------------------------------------------------------------------------


@pytest.mark.parametrize("rows", rows("locomo.jsonl", "category"))
def test_locomo_as_recorded(rows):
    for row in rows:
        score = scoring.locomo(row["category"], row["answer"], row["prediction"])
        assert score == pytest.approx(row["score"], abs=1e-9), row


@pytest.mark.parametrize("rows", rows("memory_agent_bench.jsonl", "source"))
def test_memory_agent_bench_as_recorded(rows):
    for row in rows:
        scores = scoring.memory_agent_bench(row["source"], row["answers"], row["prediction"])
        assert scores == pytest.approx(row["metrics"], abs=1e-9), row
        assert scoring.main_metric(row["source"]) in scores


@pytest.mark.parametrize(
    ("category", "answer", "prediction", "expected"),
    [
        pytest.param(2, 2022, "In 2022.", 2 / 3, id="a number in the data"),
        pytest.param(4, "cats and dogs", "a cat, the dog", 1, id="stems, no articles, no and"),
        pytest.param(4, "well-being", "wellbeing", 1, id="punctuation goes"),
        pytest.param(4, "Café", "CAFÉ", 1, id="unicode case"),
        pytest.param(4, "café", "cafe", 0, id="accents stay"),
        pytest.param(4, "yes", "", 0, id="empty prediction"),
        pytest.param(4, "the", "the", 0, id="nothing left on either side"),
        pytest.param(3, "Yes; he sings", "yes", 1, id="category 3 looks before the semicolon"),
        pytest.param(2, "Yes; he sings", "yes", 1 / 2, id="category 2 does not"),
        pytest.param(1, "piano, violin", "violin, drums", 1 / 2, id="one of two items"),
        pytest.param(1, "piano, violin", "violin, drums, piano", 1, id="extra items cost nothing"),
        pytest.param(1, "piano, violin", "", 0, id="empty list"),
        pytest.param(5, None, "That is NOT MENTIONED.", 1, id="adversarial refused"),
        pytest.param(5, "his cat", "No information available, but his cat", 1, id="adversarial half refused"),
        pytest.param(5, "his cat", "his cat", 0, id="adversarial trap"),
        pytest.param(5, "his cat", "", 0, id="adversarial silence"),
    ],
)
def test_locomo_rules(category, answer, prediction, expected):
    assert scoring.locomo(category, answer, prediction) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("source", "prediction", "exact"),
    [
        pytest.param("ruler_qa2_421K", "Let me see.\nanswer: Paris\nDone.", 1, id="the answer line"),
        pytest.param("ruler_qa2_421K", "Answer: Answer: Paris", 1, id="a repeated prefix"),
        pytest.param("ruler_qa2_421K", "Paris\nI am sure.", 1, id="the first line"),
        pytest.param("ruler_qa2_421K", "I think\nParis", 0, id="not the second"),
        pytest.param("ruler_qa2_421K", "Answer:\nParis", 0, id="an empty answer line"),
        pytest.param("longmemeval_s*", "", 0, id="empty"),
        pytest.param("icl_trec_fine_6400shot_balance", "Label.\nAnswer: Paris", 1, id="icl"),
    ],
)
def test_memory_agent_bench_answer_line(source, prediction, exact):
    assert scoring.memory_agent_bench(source, ["Paris"], prediction)["exact_match"] == exact


def test_memory_agent_bench_looks_at_the_whole_prediction_or_not():
    prediction = "It was Paris.\nAnswer: London"
    for source, found in {"detective_qa": 1, "icl_nlu_8296shot_balance": 0, "eventqa_full": 0}.items():
        assert scoring.memory_agent_bench(source, ["Paris"], prediction)["substring_exact_match"] == found
    assert scoring.memory_agent_bench("eventqa_full", ["PARIS", "London"], prediction)["eventqa_recall"] == 1
    assert scoring.memory_agent_bench("eventqa_full", ["Paris", "Rome"], prediction)["eventqa_recall"] == 0


def test_memory_agent_bench_summaries_are_compared_line_by_line():
    scores = scoring.memory_agent_bench(
        "infbench_sum_eng_shots2", ["he left\nshe stayed"], "she stayed\nhe left"
    )
    # In order, only one of the two sentences can be matched; one alone has full precision.
    assert scores["rougeL_f1"] == pytest.approx(2 / 3) and scores["rougeLsum_f1"] == pytest.approx(1)


@pytest.mark.parametrize(
    ("answers", "prediction", "recalls"),
    [
        pytest.param(["0"], "1. Alien (1979)\n2. Heat", (1, 1, 1), id="first"),
        pytest.param(["4", "2"], "Sure:\n1. Alien\n2) Heat\n3、Up", (0, 1, 1), id="among five"),
        pytest.param(["5"], "1. Up\n2. Up\n3. Up\n4. Up\n5. Up\n6. Toy Story", (0, 0, 1), id="among ten"),
        pytest.param(["5"], "1. " + "Up\n" * 10 + "Toy Story", (0, 0, 0), id="eleventh"),
        pytest.param(["3"], "1. Spiderman", (1, 1, 1), id="nearest title"),
        pytest.param(["4", "5"], "Heat, Toy Story", (1 / 2, 1, 1), id="commas without numbers"),
        pytest.param(["2"], "", (1, 1, 1), id="nothing is nearest to the shortest title"),
    ],
)
def test_memory_agent_bench_recommendations(answers, prediction, recalls):
    scores = scoring.memory_agent_bench("recsys_redial_full", answers, prediction, MOVIES)
    assert tuple(scores) == ("recsys_recall@1", "recsys_recall@5", "recsys_recall@10")
    assert tuple(scores.values()) == pytest.approx(recalls)


# ---- any short answer ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("answers", "prediction", "exact", "f1", "contained"),
    [
        pytest.param("Paris", "paris.", 1, 1, 1, id="case and punctuation"),
        pytest.param("the Eiffel Tower", "Eiffel  tower", 1, 1, 1, id="articles and spaces"),
        pytest.param("Paris", "It is Paris", 0, 1 / 2, 1, id="in a sentence"),
        pytest.param("12", "at 127 Main St", 0, 0, 0, id="part of a number"),
        pytest.param("cat", "concatenate", 0, 0, 0, id="part of a word"),
        pytest.param("New York", "York is new", 0, 4 / 5, 0, id="other order"),
        pytest.param(["Paris", "the city of light"], "City of Light!", 1, 1, 1, id="several answers"),
        pytest.param("no no yes", "no yes yes", 0, 2 / 3, 0, id="words count once each"),
        pytest.param("北京", "北京。", 0, 0, 0, id="only ASCII punctuation goes"),
        pytest.param("Ærø", "ærø", 1, 1, 1, id="unicode case"),
        pytest.param("Paris", "", 0, 0, 0, id="empty prediction"),
        pytest.param("Paris", "the, a; an!", 0, 0, 0, id="nothing left of the prediction"),
    ],
)
def test_short_answers(answers, prediction, exact, f1, contained):
    assert scoring.exact_match(answers, prediction) == exact
    assert scoring.token_f1(answers, prediction) == pytest.approx(f1)
    assert scoring.contains(answers, prediction) == contained


def test_hotpotqa_yes_and_no_share_nothing_with_a_longer_text():
    assert scoring.token_f1("yes", "yes, both") == pytest.approx(2 / 3)
    assert scoring.hotpotqa("yes", "yes, both") == {"em": 0, "f1": 0}
    assert scoring.hotpotqa("both bands", "no") == {"em": 0, "f1": 0}
    assert scoring.hotpotqa("yes", "Yes.") == {"em": 1, "f1": 1}
    assert scoring.hotpotqa("Chief of Protocol", "chief") == {"em": 0, "f1": 0.5}


# ---- how sure ------------------------------------------------------------------------------------


def test_the_interval_is_the_normal_one_for_many_scores():
    scores = np.random.default_rng(1).random(2000)
    low, high = scoring.confidence_interval(scores)
    half = 1.96 * scores.std() / len(scores) ** 0.5
    assert low == pytest.approx(scores.mean() - half, abs=half / 10)
    assert high == pytest.approx(scores.mean() + half, abs=half / 10)


def test_the_interval_depends_on_the_seed_not_on_the_order():
    scores = list(np.random.default_rng(1).random(50))
    assert scoring.confidence_interval(scores) == scoring.confidence_interval(scores[::-1])
    assert scoring.confidence_interval(scores) != scoring.confidence_interval(scores, seed=1)


def test_scores_without_spread():
    assert scoring.confidence_interval([0, 0, 0]) == (0, pytest.approx(0.5615, abs=1e-4))
    assert scoring.confidence_interval([True] * 100) == (pytest.approx(0.9630, abs=1e-4), 1)
    assert scoring.confidence_interval([0.5, 0.5]) == (0.5, 0.5)


# ---- what cannot be scored -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: scoring.exact_match("a", None), TypeError, "the prediction must be a string, got None"),
        (lambda: scoring.token_f1(3, "a"), TypeError, "answers must be a string or a list of strings, got 3"),
        (lambda: scoring.exact_match([["a"]], "a"), TypeError, "answers must be"),
        (lambda: scoring.exact_match([], "a"), ValueError, "at least one answer"),
        (lambda: scoring.contains("The", "the end"), ValueError, "nothing of the answer 'The' is left"),
        (lambda: scoring.locomo(6, "a", "a"), ValueError, "categories are 1 to 5, got 6"),
        (lambda: scoring.locomo("1", "a", "a"), ValueError, "categories are 1 to 5, got '1'"),
        (
            lambda: scoring.locomo(4, None, "a"),
            TypeError,
            "the answer must be a string or a number, got None",
        ),
        (lambda: scoring.locomo(5, "a", None), TypeError, "the prediction must be a string"),
        (
            lambda: scoring.main_metric("squad"),
            ValueError,
            "no source 'squad'; its sources begin with ruler_qa, ",
        ),
        (lambda: scoring.memory_agent_bench("ruler_qa1", [], "a"), ValueError, "at least one answer"),
        (lambda: scoring.memory_agent_bench("recsys_x", ["0"], "1. Up"), ValueError, "entity2id.json"),
        (lambda: scoring.memory_agent_bench("recsys_x", ["9"], "Up", MOVIES), ValueError, r"got \['9'\]"),
        (lambda: scoring.memory_agent_bench("recsys_x", ["Up"], "Up", MOVIES), ValueError, r"got \['Up'\]"),
        (lambda: scoring.confidence_interval([]), ValueError, "at least one score"),
        (lambda: scoring.confidence_interval([0.5, 1.5]), ValueError, "from 0.5 to 1.5"),
        (lambda: scoring.confidence_interval([0.5, float("nan")]), ValueError, "from 0.5 to nan"),
    ],
)
def test_refused_in_one_line(call, error, message):
    with pytest.raises(error, match=message) as caught:
        call()
    assert "\n" not in str(caught.value)


def test_a_missing_library_names_the_extra(monkeypatch):
    scoring._stemmer.cache_clear()
    monkeypatch.setitem(sys.modules, "nltk.stem", None)
    with pytest.raises(ImportError, match=r'this score needs nltk.*: pip install -e "\.\[eval\]"'):
        scoring.locomo(4, "a dog", "a dog")
    assert scoring.locomo(5, None, "not mentioned") == 1
