"""20,000 mutated rules, forms and patterns: each is read or told, none takes two seconds, all of them little memory.

Each is checked as `peftc check FILE` does. Run with -s to see the figures. The mutations are drawn from a fixed seed:
characters, lines and values changed, parts of other rules grafted in, parts repeated many times, nested deep, or made
large.
"""

from __future__ import annotations

import random
import re
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest

from peftc.checking.check import check

resource = pytest.importorskip("resource")

ROOT = Path(__file__).parents[2]
COUNT = 20_000
EXAMPLES = [*(ROOT / "rules").glob("*.yaml"), *(ROOT / "examples").rglob("*.yaml")]
RULES = [path.read_text(encoding="utf-8") for path in sorted(EXAMPLES)]
OTHERS = [path.read_text(encoding="utf-8") for path in sorted((ROOT / "rules").glob("*/*.yaml"))]
PAGE = (ROOT / "rules" / "LANGUAGE.md").read_text(encoding="utf-8")
PARTS = [f"peftc: 1\nname: part\n{part}" for part in re.findall(r"```yaml\n(.*?)```", PAGE, re.DOTALL)]
"""What the page on the language shows: a use of every key."""
BAD = [path.read_text(encoding="utf-8") for path in sorted((Path(__file__).parent / "golden").glob("*.yaml"))]
PIECES = [
    *"{}[]:,-?*&!|>'\"%@`#\n\t\\ .()+/=\x00\x1b\x85λ\ud800\U0001f600",
    *(": ", "- ", "<<: *a", "&a ", "*a", "!!python/name:os.system ", "~", "null", "[[", "}}", "1e999", "0x", "-1", "0"),
    *("r", "dh", "h", "lambda", "at: ffn", "\n  ", "---\n", "if", " if h else ", "**", "@", "x[0]", ".T", "None"),
    *(
        '"\\UFFFFFFFF"',
        '"\\ud800"',
        "%YAML 1.1\n",
        "deltas:",
        "form: ",
        "relu(",
        "9" * 30,
        "\r\n",
        "einsum('",
        "x" * 300,
    ),
    *(
        "extends: lora\n",
        "include: [a.yaml]\n",
        "tests: {a: {family: bert, identity: true, sites: 2}}\n",
        "from: block[layer - 1].out",
        "{budget: 0.5%}",
        "{default: 8, layers: {0: 16, last 1: 4}}",
        "rewrite:",
        "patterns:",
        "svd_u(h, r)",
        "before: lora",
    ),
    *(
        "__import__('os').system('true')",
        "().__class__",
        "{x.__class__}",
        "%(r)s",
        "lambda: 0",
        "x := 1",
        "9 ** 9 ** 9",
    ),
]
WORDS = re.compile(r"[A-Za-z_]\w*|\d+(?:\.\d+)?")


def mutant(random: random.Random) -> str:
    (kind,) = random.choices([RULES, PARTS, OTHERS, BAD], [5, 2, 2, 2])
    text = random.choice(kind)
    gentle = random.random() < 0.7  # most stay YAML, and get as far as the language
    for _ in range(random.randint(1, 4 if gentle else 6)):
        text = random.choice(GENTLE if gentle else MUTATIONS)(text, random)
    return text[: 200 * 1024]


def _change_characters(text: str, random: random.Random) -> str:
    at = random.randint(0, len(text))
    return text[:at] + random.choice(PIECES) + text[at + random.randint(0, 12) :]


def _change_a_word(text: str, random: random.Random) -> str:
    found = list(WORDS.finditer(text))
    if not found:
        return text
    word, other = random.choice(found), random.choice(found)
    replacement = random.choice([other.group(), word.group()[:-1], word.group() * 2, *random.sample(PIECES, 2)])
    return text[: word.start()] + replacement + text[word.end() :]


def _exchange_words(text: str, random: random.Random) -> str:
    """Put a word of this or another rule, or a misspelt one, in the place of a word."""
    found, others = list(WORDS.finditer(text)), WORDS.findall(random.choice(RULES))
    if not found or not others:
        return text
    word = random.choice(found)
    misspelt = word.group()[:1] + word.group()[2:] or "x"
    replacement = random.choice([random.choice(found).group(), random.choice(others), random.choice(others), misspelt])
    return text[: word.start()] + replacement + text[word.end() :]


def _change_lines(text: str, random: random.Random) -> str:
    lines = text.splitlines(keepends=True) or [""]
    i, j = random.randrange(len(lines)), random.randrange(len(lines))
    kind = random.randrange(4)
    if kind == 0:
        lines[i], lines[j] = lines[j], lines[i]
    elif kind == 1:
        del lines[i]
    elif kind == 2:
        lines.insert(j, lines[i])
    else:
        lines[i] = " " * random.randint(1, 4) + lines[i]
    return "".join(lines)


def _graft(text: str, random: random.Random) -> str:
    other = random.choice(RULES)
    start = random.randrange(len(other))
    at = random.randint(0, len(text))
    return text[:at] + other[start : start + random.randint(1, 200)] + text[at:]


def _repeat(text: str, random: random.Random) -> str:
    start = random.randint(0, len(text))
    part = text[start : start + random.randint(1, 80)]
    return text[:start] + part * random.choice([2, 5, 30, 400]) + text[start:]


def _nest(text: str, random: random.Random) -> str:
    at, depth = random.randint(0, len(text)), random.choice([3, 35, 300])
    opening, closing = random.choice([("(", ")"), ("[", "]"), ("{a: ", "}"), ("-", ""), ("not ", ""), ("relu(", ")")])
    return text[:at] + opening * depth + "x" + closing * depth + text[at:]


GENTLE = [_exchange_words] * 12 + [_change_lines]
MUTATIONS = [_change_characters] * 6 + [_change_a_word] * 6 + [_change_lines] * 3 + [_graft, _repeat, _nest]


def told(text: str, file: Path) -> str:
    """`read`, or the first code that `peftc check` tells of a file with this text."""
    file.write_bytes(text.encode("utf-8", "surrogatepass"))
    (checked,) = check([str(file)]).files
    for diagnostic in checked.diagnostics:
        span = diagnostic.span
        assert diagnostic.render()
        assert span is None or (span.line >= 1 and 1 <= span.col < span.end_col)
    return next((d.code for d in checked.diagnostics if d.severity == "error"), "read")


def peak_memory() -> float:
    """In MB. On Linux `ru_maxrss` starts from what the parent process held, so the kernel's own count is read."""
    status = Path("/proc/self/status")
    if status.exists():
        return int(re.search(r"VmHWM:\s+(\d+) kB", status.read_text())[1]) / 2**10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)


def run(folder: Path) -> None:
    """Check `COUNT` mutants in this process, and say what it took."""
    draw = random.Random(20_000)
    codes: Counter[str] = Counter()
    longest, worst = 0.0, ""
    start = time.perf_counter()
    for _ in range(COUNT):
        text = mutant(draw)
        before = time.process_time()
        codes[told(text, folder / "mutant.yaml")] += 1
        seconds = time.process_time() - before
        if seconds > longest:
            longest, worst = seconds, text
    peak = peak_memory()
    print(f"{COUNT} mutants in {time.perf_counter() - start:.0f} s: longest {longest:.2f} s ({len(worst)} characters),")
    print(f"peak memory {peak:.0f} MB; {codes['read']} read, told: {dict(sorted(codes.items()))}")
    assert longest < 2
    assert peak < 500


@pytest.mark.slow
def test_no_mutant_crashes_takes_long_or_takes_much_memory(tmp_path: Path) -> None:
    """In a process of its own, whose memory no other test has used."""
    done = subprocess.run([sys.executable, __file__, str(tmp_path)], capture_output=True, text=True, check=False)
    print(f"\n{done.stdout}")
    assert done.returncode == 0, done.stderr[-3000:]
    assert "peak memory" in done.stdout


def test_some_mutants_are_read_or_told(tmp_path: Path) -> None:
    draw = random.Random(0)
    assert len({told(mutant(draw), tmp_path / "mutant.yaml") for _ in range(150)}) > 5


if __name__ == "__main__":
    run(Path(sys.argv[1]))
