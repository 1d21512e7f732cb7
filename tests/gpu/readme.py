"""Puts the figures of the newest GPU suite into README.md, between two marks.

    python -m tests.gpu.readme

Reads tests/benchmarks/results/gpu-suite-DATE.json, which launchers/gpu_suite.sh has written.
"""

import json
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "tests/benchmarks/results"
BEGIN, END = "<!-- GPU figures, by python -m tests.gpu.readme -->\n", "<!-- end of the GPU figures -->\n"


def update(readme: Path, results: Path) -> None:
    """Replaces what stands between the marks.

    Raises:
        SystemExit: no results, or no marks.
    """
    files = sorted(results.glob("gpu-suite-*.json"))
    if not files:
        sys.exit(f"readme: no gpu-suite-*.json in {results}: run launchers/gpu_suite.sh on a machine with a GPU first")
    text = readme.read_text()
    if text.count(BEGIN) != 1 or text.count(END) != 1:
        sys.exit(f"readme: {readme} lacks the lines {BEGIN.strip()} and {END.strip()}")
    before, rest = text.split(BEGIN)
    section = "\n".join(lines(json.loads(files[-1].read_text()), files[-1].name))
    readme.write_text(f"{before}{BEGIN}{section}\n{END}{rest.split(END)[1]}")


def lines(suite: dict, file: str) -> Iterator[str]:
    """The section, in Markdown."""
    parts = {name: part for name, part in suite["parts"].items() if "figures" in part}
    versions = ", ".join(f"{name} {number}" for name, number in suite["versions"].items() if number)
    yield f"{suite['device']}, {suite['date']} ({versions}; [figures](tests/benchmarks/results/{file}))."
    if "accuracy" in parts:
        yield f"The kernels are within {parts['accuracy']['figures']['worst']:.1e} of float64."
    if "benchmark" in parts:
        yield from svgd_table(parts["benchmark"]["figures"]["figures"])
    profiles = {name: part["figures"]["profiles"] for name, part in parts.items() if name.startswith("profile")}
    if profiles:
        yield from profile_table([profile for of_part in profiles.values() for profile in of_part])
    if "graphs" in parts:
        yield ""
        for model, ways in parts["graphs"]["figures"]["models"].items():
            yield (
                f"{model}, steps of different rows: {ways['graphs']['steady_ms']:.1f} ms with CUDA graphs, "
                f"{ways['plain']['steady_ms']:.1f} ms without; {ways['graphs']['first_ms']:.0f} ms where a size is new."
            )
    for name, part in parts.items():
        if name.startswith("peft"):
            over = part["figures"]["over_ours"]
            model = name.removeprefix("peft ")
            yield (
                f"\n{model}: PEFT's PromptTuning once per particle takes {over['peft']:.1f} times as long as our step, "
                f"one padded batch {over['plain']:.1f} times."
            )
    failed = [f"{name}: {part['status']}" for name, part in suite["parts"].items() if part["status"] != "passed"]
    if failed:
        yield f"\nNot passed: {'; '.join(failed)}."


def svgd_table(rows: list[dict]) -> Iterator[str]:
    """A line a size, a column a way; what failed is a dash."""
    times = {(row["M"], row["D"], row["way"]): row for row in rows if "gpu_us" in row}
    ways = list(dict.fromkeys(way for _, _, way in times))
    yield "\nMicroseconds of a step's SVGD with AdamW on the GPU:\n"
    yield f"| M | D | {' | '.join(ways)} | floor of its bytes |\n{'|---' * (len(ways) + 3)}|"
    for M, D in dict.fromkeys((M, D) for M, D, _ in times):
        cells = [f"{times[M, D, way]['gpu_us']:.1f}" if (M, D, way) in times else "-" for way in ways]
        floor = next(row["floor_us"] for (m, d, _), row in times.items() if (m, d) == (M, D))
        yield f"| {M} | {D:,} | {' | '.join(cells)} | {floor:.1f} |"


def profile_table(profiles: list[dict]) -> Iterator[str]:
    yield (
        "\nSource stage, five particles of 100 tokens, a row of each of six tasks, random weights, rows as long as the "
        "tasks':\n\n| model | layout | activations | s a step | forward | backward | SVGD | SVGD / backward | TFLOP/s "
        "| of the matrix peak | GB |\n|---|---|---|---|---|---|---|---|---|---|---|"
    )
    for profile in profiles:
        source = profile["stages"]["source"]
        step, forward, backward, svgd = (
            source["seconds"][name]["median"] for name in ("step", "forward", "backward", "svgd")
        )
        layout = "ZeRO-3" if profile["zero"]["stage"] == 3 else "resident"
        layout += ", graphs" if "capture_seconds" in source else ""
        kept = "recomputed" if profile["recomputed"] else "kept"
        yield (
            f"| {profile['model']} | {layout} | {kept} | {step:.3f} | {forward:.3f} | {backward:.3f} "
            f"| {svgd * 1e6:.0f} us | {source['svgd_over_backward']:.2%} "
            f"| {source['model_flops_per_second'] / 1e12:.1f} | {source['share_of_peak']:.0%} "
            f"| {source['peak_memory'] / 1e9:.1f} |"
        )


if __name__ == "__main__":
    update(ROOT / "README.md", RESULTS)
