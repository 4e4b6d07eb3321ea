"""Prompts by templates, one domain a function: what users ask, made without a data set.

A prompt follows from a numpy generator alone (and, for the domains that need a text to work on,
from passages given to it), so a seed and an index say which prompt it is.
"""

from collections.abc import Callable, Sequence

import numpy as np

from specjax.training import topics

__all__ = ["DOMAINS", "NEEDS_PASSAGES", "make", "opening"]


def make(domain: str, generator: np.random.Generator, passages: Sequence[str] = ()) -> str:
    """One thing that a user says.

    Args:
      domain: one of `DOMAINS`.
      generator: advanced.
      passages: texts to work on, which the domains in `NEEDS_PASSAGES` draw from.

    Raises:
      ValueError: an unknown domain, or no passages for one that needs them.
    """
    if domain not in DOMAINS:
        raise ValueError(f"unknown domain {domain!r}; known: {', '.join(DOMAINS)}")
    if domain in NEEDS_PASSAGES and not passages:
        raise ValueError(f"domain {domain!r} works on passages, and none were given")
    return DOMAINS[domain](generator, passages)


def opening(generator: np.random.Generator) -> str:
    """The first words of something that a user says, perhaps none, of any kind.

    Args:
      generator: advanced.
    """
    return _pick(generator, topics.OPENINGS[_pick(generator, tuple(topics.OPENINGS))])


def _pick(generator: np.random.Generator, choices: Sequence):
    return choices[int(generator.integers(len(choices)))]


def _chat(generator: np.random.Generator, passages: Sequence[str]) -> str:
    topic, aspect = _pick(generator, topics.TOPICS), _pick(generator, topics.ASPECTS)
    place, name = _pick(generator, topics.PLACES), _pick(generator, topics.NAMES)
    profession = _pick(generator, topics.PROFESSIONS)
    forms = (
        f"Tell me about {aspect} {topic}.",
        f"Write a blog post about {aspect} {topic}.",
        f"Explain {topic} to a {profession}.",
        f"Pretend you are a {profession} from {place}. What do you think of {topic}?",
        f"Give me {generator.integers(3, 9)} tips about {topic}.",
        f"Write an email to {name} about {topic}.",
        f"Compare {topic} and {_pick(generator, topics.TOPICS)}.",
        f"What should a {profession} know about {topic}?",
        f"Plan a trip to {place} for someone who likes {topic}.",
        f"Write a short story in which {name}, a {profession}, learns about {topic}.",
        f"Describe {aspect} {topic} in {generator.integers(2, 6)} paragraphs.",
        f"Write a dialogue between {name} and a {profession} about {topic}.",
        f"List the pros and cons of {topic} as a JSON object.",
        f"How would you convince a {profession} that {topic} matters?",
    )
    return _pick(generator, forms)


def _code(generator: np.random.Generator, passages: Sequence[str]) -> str:
    language = _pick(generator, ("Python", "Python", "Python", "JavaScript", "Java", "C++"))
    if generator.random() < 0.25:
        task = _pick(generator, topics.CODE_TASKS)
        forms = (
            f"Write a {language} program that {task}.",
            f"Write a {language} function that {task}, and explain it.",
            f"Show me code in {language} that {task}.",
        )
        return _pick(generator, forms)
    source = _function(generator)
    forms = (
        "Complete this Python function. Answer with the whole function in a code block.",
        "Implement the following function in Python.",
        "Finish the function below and give me the complete code.",
        "Write the body of this function. Reply with one code block.",
    )
    return f"{_pick(generator, forms)}\n\n```python\n{source}```"


def _function(generator: np.random.Generator) -> str:
    """A signature with a docstring, and perhaps an example of a call."""
    taken, argument, annotation, example = _pick(generator, topics.CODE_ITEMS)
    result, suffix, returned = _pick(generator, topics.CODE_RESULTS[annotation])
    condition = _pick(generator, topics.CODE_CONDITIONS[annotation])
    name = f"{condition}_{suffix}".replace("-", "_").lower()
    used = [kind for kind in ("Dict", "List", "Optional", "Tuple") if kind in annotation + returned]
    imports = f"from typing import {', '.join(used)}\n\n\n" if used else ""
    texts = (
        f"Given {taken}, return {result.format(condition)}.",
        f"Return {result.format(condition)} of {argument}, {taken}.",
        f"This function takes {taken} and returns\n    {result.format(condition)}.",
    )
    call = f"\n    >>> {name}({example})" if generator.random() < 0.6 else ""
    return (
        f"{imports}def {name}({argument}: {annotation}) -> {returned}:\n"
        f'    """ {_pick(generator, texts)}{call}\n    """\n'
    )


def _editing(generator: np.random.Generator, passages: Sequence[str]) -> str:
    return f"{_pick(generator, topics.EDITS)}:\n\n{_pick(generator, passages)}"


def _summarisation(generator: np.random.Generator, passages: Sequence[str]) -> str:
    count = generator.integers(1, 5)
    forms = (
        "Sum up: {}",
        "Summarize the following text.\n\n{}",
        "{}\n\nWhat are the main points of this text?",
        f"Write a summary of {count} sentences of this article:\n\n{{}}",
        "Please give a short summary of this:\n{}",
    )
    return _pick(generator, forms).format(_pick(generator, passages))


def _translation(generator: np.random.Generator, passages: Sequence[str]) -> str:
    # German most of all, since most of what is asked in this domain is.
    language = _pick(generator, (*["German"] * 3, *topics.LANGUAGES))
    parts = (_pick(generator, part.split("; ")) for part in topics.SENTENCES[language])
    subject, verb, ending = parts
    joint = "" if ending.startswith(",") or not ending else " "
    stop = _pick(generator, (".", ".", ""))
    sentence = f"{subject} {verb}{joint}{ending}{stop}"
    forms = (
        f"Translate {language} to English: {sentence}",
        f"Translate the following {language} sentence into English.\n\n{sentence}",
        f"What does this mean in English? {sentence}",
        f"Translate from {language}: {sentence}",
    )
    return _pick(generator, forms)


def _question_answering(generator: np.random.Generator, passages: Sequence[str]) -> str:
    topic, place = _pick(generator, topics.TOPICS), _pick(generator, topics.PLACES)
    name = _pick(generator, topics.NAMES)
    if generator.random() < 0.4:
        forms = (
            f"Answer the question from the text.\n\n{{}}\n\nQuestion: What is said about {topic}?",
            "{}\n\nUsing only the text above, explain what it is about and why it matters.",
            "Text: {}\n\nWhich facts does the text name? Answer in full sentences.",
        )
        return _pick(generator, forms).format(_pick(generator, passages))
    forms = (
        f"Who first studied {topic}?",
        f"When did people in {place} begin to care about {topic}?",
        f"What is the capital, the language and the currency of {place}?",
        f"Where does the idea of {topic} come from?",
        f"Why is {place} famous?",
        f"How does {topic} work?",
        f"What is the difference between {topic} and {_pick(generator, topics.TOPICS)}?",
        f"Who wrote the best known book about {topic}?",
        f"What year was {topic} first mentioned in {place}?",
        f"What does the name {name} mean?",
        f"How many people live in {place}?",
        f"What is the most famous film about {topic}?",
    )
    return _pick(generator, forms)


def _mathematics(generator: np.random.Generator, passages: Sequence[str]) -> str:
    a, b, c = (int(x) for x in generator.integers(2, 40, size=3))
    price = int(generator.integers(2, 20))
    name, other = _pick(generator, topics.NAMES), _pick(generator, topics.NAMES)
    goods, place = _pick(generator, topics.GOODS), _pick(generator, topics.PLACES)
    forms = (
        f"{name} buys {a} {goods} for ${price} each and pays with ${a * price + b}. How much "
        "change is left?",
        f"{name} has {a} {goods}. {other} has {b} times as many. How many do they have together?",
        f"A train to {place} travels at {10 * price} miles per hour for {c} hours. How far does "
        "it go?",
        f"{name} makes {a} {goods} a day and gives {b} of them away. How many are left after "
        f"{c} days?",
        f"A box holds {a} {goods}. {name} fills {b} boxes and sells half of what is in them at "
        f"${price} each. How much money does {name} get?",
        f"Solve for x: {price}x + {a} = {b + 40}.",
        f"What is {a} percent of {10 * c}?",
        f"A garden is {a} feet long and {b} feet wide. What are its area and its perimeter?",
        f"{name} saves ${price} a week. After {a} weeks, {name} spends ${b} on {goods}. How much "
        "money is left?",
        f"In a class of {a + b} students, {a} like {goods}. A third of the others do not. How many "
        "students is that?",
        f"{name} reads {a} pages on Monday, twice as many on Tuesday and {b} fewer on Wednesday. "
        "How many pages is that in all?",
        f"The sum of two numbers is {a + b} and their difference is {abs(a - b)}. What are they?",
    )
    return _pick(generator, forms)


def _passage(generator: np.random.Generator, passages: Sequence[str]) -> str:
    topic, place = _pick(generator, topics.TOPICS), _pick(generator, topics.PLACES)
    aspect, name = _pick(generator, topics.ASPECTS), _pick(generator, topics.NAMES)
    forms = (
        f"Write a news article about {topic} in {place}.",
        f"Write an encyclopedia entry about {aspect} {topic}.",
        f"Write a newspaper report in which {name} speaks about {topic}.",
        f"Write a paragraph about {topic} for a school book.",
        f"Write a short text about {place} and {topic}.",
    )
    return _pick(generator, forms)


# What the prompts of a domain are; `passage` asks for texts that other domains then work on.
DOMAINS: dict[str, Callable[[np.random.Generator, Sequence[str]], str]] = {
    "passage": _passage,
    "chat": _chat,
    "code": _code,
    "editing": _editing,
    "summarisation": _summarisation,
    "translation": _translation,
    "question_answering": _question_answering,
    "mathematics": _mathematics,
}
NEEDS_PASSAGES = frozenset({"editing", "summarisation", "question_answering"})
