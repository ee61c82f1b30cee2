"""Text for the bundled pair, from what every Python installation has: four domains of different predictability.

``arithmetic`` and ``records`` are generated from a seed; ``code`` is the standard library's source and ``prose`` its
documentation, so those two depend on the Python version (the model card names the one that was used).
"""

import ast
import pydoc_data.topics
import random
import sysconfig
from collections.abc import Iterator
from pathlib import Path

DOMAINS = ("arithmetic", "records", "code", "prose")
FIRST = """Alice Bruno Clara David Elena Felix Grace Hugo Irene Jonas Karin Louis Maria Nadia Oscar Paula
Quinn Rosa Simon Tara Victor Wanda Yusuf Zoe""".split()
LAST = """Adler Baker Costa Duarte Evans Fischer Garcia Hansen Ito Jensen Keller Lopez Moore Novak Olsen
Perez Quist Rossi Silva Tanaka Urban Vogel Weber Young""".split()
CITIES = {
    "Lisbon": "Portugal", "Oslo": "Norway", "Kyoto": "Japan", "Lima": "Peru", "Berlin": "Germany", "Quito": "Ecuador",
    "Turin": "Italy", "Lyon": "France", "Porto": "Portugal", "Bergen": "Norway", "Osaka": "Japan", "Bonn": "Germany",
}  # fmt: skip
PLACES = ("ones", "tens", "hundreds", "thousands")


def worked_sum(a: int, b: int) -> str:
    """One addition in columns, as a pupil writes it."""
    lines, carry, digits = [], 0, ""
    for place in PLACES[: max(len(str(a)), len(str(b)))]:
        (a_rest, x), (b_rest, y) = divmod(a, 10), divmod(b, 10)
        total = x + y + carry
        lines.append(f"  {place}: {x} + {y} + {carry} = {total}, write {total % 10}, carry {total // 10}")
        digits, carry, a, b = f"{total % 10}{digits}", total // 10, a_rest, b_rest
    answer = int(digits) + carry * 10 ** len(digits)
    return "\n".join(lines) + f"\n  answer: {answer}\n"


def arithmetic(rng: random.Random) -> str:
    """A sheet that starts at one number and adds the same step again and again."""
    value, step = rng.randint(100, 4999), rng.randint(11, 999)
    text = f"Start at {value} and add {step} each time.\n"
    for index in range(1, 9):
        if value > 9000:
            break
        text += f"Step {index}: {value} + {step}\n{worked_sum(value, step)}"
        value += step
    return text


def records(rng: random.Random) -> str:
    """JSON lines about people: sequential ids, an e-mail made of the name, a country that follows the city."""
    number, lines = rng.randint(100, 9900), []
    for offset in range(rng.randint(4, 9)):
        first, last, city = rng.choice(FIRST), rng.choice(LAST), rng.choice(list(CITIES))
        lines.append(
            f'{{"id": {number + offset}, "name": "{first} {last}", '
            f'"email": "{first.lower()}.{last.lower()}@example.org", "city": "{city}", '
            f'"country": "{CITIES[city]}", "active": {rng.choice(("true", "true", "true", "false"))}, '
            f'"plan": "{rng.choice(("free", "free", "team"))}"}}'
        )
    return "\n".join(lines) + "\n"


def standard_library() -> list[Path]:
    """Source files of the standard library, without its tests and installed packages."""
    root = Path(sysconfig.get_paths()["stdlib"])
    skip = {"site-packages", "test", "tests", "idle_test", "lib2to3", "pydoc_data", "encodings", "__pycache__"}
    return sorted(p for p in root.rglob("*.py") if not skip & set(p.relative_to(root).parts))


def library_split(seed: int) -> tuple[list[str], list[str]]:
    """The library's source files, shuffled, as training and held-out texts."""
    texts = [text for path in standard_library() if 400 < len(text := path.read_text("utf-8", "ignore")) < 60_000]
    random.Random(f"library-{seed}").shuffle(texts)
    return texts[64:], texts[:64]


def docstrings(source: str) -> Iterator[str]:
    try:
        tree = ast.parse(source)
    except (SyntaxError, ValueError):
        return
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
            text = ast.get_docstring(node) or ""
            if len(text) > 200 and ">>>" not in text:
                yield text + "\n"


def documents(domain: str, seed: int, count: int) -> tuple[list[str], list[str]]:
    """Training and held-out documents of one domain, ``count`` where they are generated.

    A document is in one of the two lists. Prose is the language reference's topics and the docstrings of the source
    files; both follow the files' split, so that no held-out docstring is seen inside a training file.
    """
    if domain == "code":
        return library_split(seed)
    if domain == "prose":
        topics = [text for _, text in sorted(pydoc_data.topics.topics.items())]
        random.Random(f"topics-{seed}").shuffle(topics)
        seen, unseen = ([text for source in side for text in docstrings(source)] for side in library_split(seed))
        return topics[16:] + seen, topics[:16] + unseen
    rng = random.Random(f"{domain}-{seed}")
    make = arithmetic if domain == "arithmetic" else records
    made = list(dict.fromkeys(make(rng) for _ in range(count)))
    return made[64:], made[:64]


def prompt(domain: str, document: str) -> str:
    """The part of a held-out document that is given; the model writes the rest."""
    lines = document.splitlines(keepends=True)
    if domain == "arithmetic":
        return "".join(lines[:2]).rstrip()  # a final newline would be another token than the one before an indented line
    if domain == "records":
        return lines[0] + '{"id":'
    start = document.index("\n", len(document) // 3 - 1) + 1
    return document[start : start + 240].rstrip()
