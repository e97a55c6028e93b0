"""What is decoded: real text, token by token, or what a model makes of a prompt.

Following a text keeps the routing that of real language; a small model left to itself soon repeats
one token, and its experts with it. Knows texts and token ids only.
"""

from collections.abc import Callable, Sequence
from pathlib import Path

from ..collect.corpora.offline import sample
from ..collect.corpora.registry import SAMPLE_FOLDER
from ..collect.corpora.split import split_of
from ..runtime.errors import UsageError
from .records import Passage

BUILT_IN = "built-in"
# Characters that hold this many tokens of any usual tokenizer, with room to spare.
_CHARACTERS_PER_TOKEN = 16


def built_in_texts(count: int, *, domain: str | None = None) -> list[tuple[str, str]]:
    """The first held-out documents of the repository's free sample, one domain after the other.

    With `domain` those of it alone; UsageError names the domains where it is none.
    """
    by_domain: dict[str, list[str]] = {}
    for document in sample(SAMPLE_FOLDER):
        if split_of(document.text) == "test":
            by_domain.setdefault(document.domain, []).append(document.text)
    domains = sorted(by_domain)
    if domain is not None:
        if domain not in by_domain:
            raise UsageError(f"prompts: no domain {domain!r}; there are {', '.join(domains)}")
        domains = [domain]
    texts = []
    for index in range(count):
        domain = domains[index % len(domains)]
        place = index // len(domains) % len(by_domain[domain])
        texts.append((f"{domain}-{place}", by_domain[domain][place]))
    return texts


def read_texts(prompts: str, count: int) -> list[tuple[str, str]]:
    """Names and texts: the built-in ones ("built-in", or "built-in:DOMAIN" for one domain's), or
    the first `count` lines that are not empty of a file.

    UsageError for a file that is not there, not UTF-8 or empty.
    """
    if prompts == BUILT_IN:
        return built_in_texts(count)
    if prompts.startswith(f"{BUILT_IN}:"):
        return built_in_texts(count, domain=prompts.partition(":")[2])
    try:
        lines = Path(prompts).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"prompts: {prompts!r} cannot be read as UTF-8 text: {error}") from error
    texts = [(f"line-{number}", line) for number, line in enumerate(lines, start=1) if line.strip()]
    if not texts:
        raise UsageError(f"prompts: {prompts!r} holds no text; a line is a prompt")
    return texts[:count]


def make_passages(
    texts: Sequence[tuple[str, str]],
    encode: Callable[[list[str]], list[list[int]]],
    *,
    num_tokens: int,
    prompt_tokens: int,
    follows_text: bool,
) -> list[Passage]:
    """Cut texts into passages of `prompt_tokens` and `num_tokens` to decode.

    `encode` gives token ids for texts. UsageError for a text too short to be followed; a prompt to
    continue freely may be shorter.
    """
    longest = (prompt_tokens + num_tokens) * _CHARACTERS_PER_TOKEN
    encoded = encode([text[:longest] for _, text in texts])
    passages = []
    for (name, _), ids in zip(texts, encoded, strict=True):
        if not follows_text:
            passages.append(Passage(name, ids[:prompt_tokens], [], num_tokens))
            continue
        if len(ids) < prompt_tokens + num_tokens:
            raise UsageError(
                f"prompts: {name} has {len(ids)} tokens; following it takes {prompt_tokens} of the "
                f"prompt and {num_tokens} to decode: give fewer --tokens, longer text, or --greedy"
            )
        following = ids[prompt_tokens : prompt_tokens + num_tokens]
        passages.append(Passage(name, ids[:prompt_tokens], following, num_tokens))
    return passages
