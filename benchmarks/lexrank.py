"""Ranking sentences: seqwise beside the packages `lexrank` and `sumy`, which compare sentences pair by pair in Python.

    python benchmarks/lexrank.py 250 2000 --rounds 1        # pip install lexrank sumy

seqwise:    words counted, similarities and scores, from the same sentences and word weights as the package
package:    the same in the package, whose own tokenizer is replaced by splitting at spaces
speedup:    package / seqwise

Sentences of 12 words drawn from a vocabulary of 3,000 with Zipf's frequencies. Neither package teleports, so seqwise
does not either here. `sumy` stops at a change of 0.1; its tolerance is lowered to 1e-12 so that scores can be compared.
Before anything is timed, all scores must agree to 1e-6 of the largest.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from common import arguments, medians, report

from seqwise.insight.explain.lexrank import Idf, LexRank

# this script has the package's name, and its folder comes first where modules are looked for
sys.path[:] = [folder for folder in sys.path if Path(folder).resolve() != Path(__file__).resolve().parent]
try:
    import lexrank as lexrank_package
    from lexrank.algorithms import summarizer as lexrank_summarizer
    from sumy.summarizers.lex_rank import LexRankSummarizer
except ImportError as missing:
    print(
        f"{missing.name} is not installed here; pip install lexrank sumy, then run benchmarks/lexrank.py again",
        file=sys.stderr,
    )
    raise SystemExit(0) from None

VOCABULARY, WORDS = 3000, 12
TOLERANCE = 1e-6
METHOD = LexRank(threshold=0.1, teleport=0.0, min_words=0)


def sentences(n: int) -> list[str]:
    """Words of letters only: `lexrank` drops others."""
    frequency = 1 / torch.arange(1, VOCABULARY + 1, dtype=torch.float64)
    drawn = torch.multinomial(frequency.expand(n, -1), WORDS, True, generator=torch.Generator().manual_seed(0))
    letters = "abcdefghijklmnop"  # four bits each
    return [" ".join("".join(letters[int(d, 16)] for d in f"{i:03x}") for i in row) for row in drawn.tolist()]


def seqwise_scores(lines: list[str], idf: Idf) -> torch.Tensor:
    return METHOD.rank([lines], idf=idf, tokenize=str.split).centrality


def lexrank_case(lines: list[str]) -> tuple[Callable[[], torch.Tensor], Idf]:
    """Word weights of the package from the sentences as documents."""
    lexrank_summarizer.tokenize = lambda text, *rest, **named: text.split()
    ranker = lexrank_package.LexRank([[line] for line in lines])
    idf = Idf(dict(ranker.idf_score), math.log(len(lines) + 1))
    return lambda: torch.from_numpy(ranker.rank_sentences(lines, threshold=0.1)), idf


def sumy_case(lines: list[str]) -> tuple[Callable[[], torch.Tensor], Idf]:
    summarizer = LexRankSummarizer()
    summarizer.epsilon = 1e-12
    document = SimpleNamespace(sentences=tuple(SimpleNamespace(words=line.split()) for line in lines))

    def scores() -> torch.Tensor:
        words = [summarizer._to_words_set(sentence) for sentence in document.sentences]
        tf, idf = summarizer._compute_tf(words), summarizer._compute_idf(words)
        matrix = summarizer._create_matrix(words, summarizer.threshold, tf, idf)
        return torch.from_numpy(summarizer.power_method(matrix, summarizer.epsilon))

    count: dict[str, int] = {}
    for line in lines:
        for word in set(line.split()):
            count[word] = count.get(word, 0) + 1
    return scores, Idf({word: math.log(len(lines) / (1 + n)) for word, n in count.items()}, 0.0)


def measure(package: str, n: int, rounds: int) -> dict[str, Any]:
    lines = sentences(n)
    theirs, idf = {"lexrank": lexrank_case, "sumy": sumy_case}[package](lines)
    ours, reference = seqwise_scores(lines, idf), theirs()
    difference = float((ours / ours.sum() - reference / reference.sum()).abs().max() / (ours / ours.sum()).max())
    assert difference < TOLERANCE, f"{package}: scores differ by {difference:.1e} of the largest"
    took = medians({"seqwise": lambda: seqwise_scores(lines, idf), "package": theirs}, rounds)
    row: dict[str, Any] = {"against": package, "sentences": n, "pairs": n * n, **took}
    row["speedup"] = took["package"] / took["seqwise"]
    row["difference"], row["checked"] = difference, True
    return row


def main() -> None:
    parser = arguments(__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("sentences", type=int, nargs="*", default=[250, 2000])
    options = parser.parse_args()
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    rows = [measure(package, n, options.rounds) for n in options.sentences for package in ("lexrank", "sumy")]
    columns: dict[str, Callable[[Any], str]] = {
        "against": str,
        "sentences": str,
        "pairs": str,
        "seqwise": "{:.3f} s".format,
        "package": "{:.2f} s".format,
        "speedup": "{:.0f}".format,
        "difference": "{:.0e}".format,
    }
    report("sentence ranking", rows, columns, options.json)


if __name__ == "__main__":
    main()
