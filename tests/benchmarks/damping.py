"""What the damping of SVGD keeps of a Gaussian posterior's variance, isotropic and not, and where the mean ends.

N(0, Sigma) with diagonal Sigma, the score in closed form, float64. Particles begin as independent draws of it, three
posterior widths off in every direction, and are brought to rest by tests/svgd/damped_gaussian.py, whose docstring
derives the closed forms that stand beside them. Settled: |phi| in posterior widths is at most 1e-4 of the drive's (1e-3
of the 50 particles at D = 200 and log spectra: no simplex fits into the widest directions), the quarters' figures moved
by less than 1% of the largest while the steps doubled, and no direction that has become empty would grow; what has not
settled is said to be so. Spectra, by their widths sigma_d:

    equal      all 1
    half_2x    half of the directions twice as wide
    log_4      20 widths from 1 to 4, evenly in the logarithm, D / 20 directions of each (4 widths where D = 4)
    log_100    the same from 1 to 100

Figures of a case: `mean` over all directions, `stiffest` and `widest` quarter: the mean of the particles' variance
(unbiased) over the true one, 1 being right; `trace`: total over total; `held`: directions with more than 1% of the
most; `offset`: of the particles' mean from the true mean, rms over directions, in posterior widths (M independent
draws: 1 / sqrt(M)). `printed` alone depends on theta's unit.

    python -m tests.benchmarks.damping [--out FILE]       FILE.png is the picture; ends with one JSON line
"""

import argparse
import json
import math
import platform
from collections.abc import Iterator, Mapping, Sequence
from datetime import date
from importlib.metadata import version
from itertools import product
from pathlib import Path

import torch
from torch import Tensor

from bmtpt_ds.svgd import init_state, svgd_step_
from tests.svgd.damped_gaussian import EMPTY, ratio_sum, rest_ratios, settle

SPECTRA = ("equal", "half_2x", "log_4", "log_100")
MS = (5, 10, 50)
MANY, FEW = 200, 4  # directions: more than particles, and, for 50 of them, fewer
RULES = (
    ("median_log", "none"),
    ("median_log", "paper"),
    ("median_log", "matched"),
    ("median", "none"),
    ("median", "paper"),  # the same as matched there
)
PRINTED = (("printed", "none"), ("printed", "paper"), ("printed", "matched"))
FEW_RULES = (("median_log", "none"), ("median", "none"))  # lambda is 1 by paper there, 0.98 by matched
SWEPT = (0.095, 0.1018, 0.15, 0.25, 0.3863, 0.6, 1.0)  # lambda at M = 10, D = 200; e^-c is 1/11
SEED = 0
SHIFT = 3.0
USER = {"M": 5, "D": 100 * 768}  # T5-base, prompts of 100 tokens


def widths(spectrum: str, D: int) -> Tensor:
    """sigma_d [D], ascending."""
    sigma_D = torch.ones(D, dtype=torch.float64)
    if spectrum == "half_2x":
        sigma_D[D // 2 :] = 2
    elif spectrum != "equal":
        levels = min(D, 20)
        exponents = torch.linspace(0, 1, levels, dtype=torch.float64).repeat_interleave(D // levels)
        sigma_D = float(spectrum.removeprefix("log_")) ** exponents
    return sigma_D


def draws(sigma_D: Tensor, M: int, seed: int = SEED) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(M, len(sigma_D), generator=generator, dtype=torch.float64) + SHIFT) * sigma_D


def shares(ratio_D: Tensor, v_D: Tensor) -> dict[str, float]:
    quarter = len(v_D) // 4
    found = {"mean": ratio_D.mean(), "stiffest": ratio_D[:quarter].mean(), "widest": ratio_D[-quarter:].mean()}
    found["trace"] = (ratio_D * v_D).sum() / v_D.sum()
    return {name: value.item() for name, value in found.items()}


def measure(spectrum: str, D: int, M: int, bandwidth: str, damping: str | float) -> dict:
    sigma_D = widths(spectrum, D)
    v_D = sigma_D**2
    simplex_fits = (v_D == v_D.max()).sum() >= M - 1
    options = {"pace": 0.5, "tolerance": 1e-4}
    if not simplex_fits:  # near neighbours push harder, and some of their motions are slow
        options = {"pace": 0.02, "tolerance": 1e-4, "most_steps": 32768} if M > D else {"pace": 0.2, "tolerance": 1e-3}
    rest = settle(draws(sigma_D, M), v_D, bandwidth, damping, **options)
    case = {"D": D, "spectrum": spectrum, "M": M, "bandwidth": bandwidth, "damping": damping, "steps": rest.steps}
    case |= {"settled": rest.settled, "apart": rest.apart, "closed_form": None}
    if rest.apart:
        return case
    ratio_D = rest.particles_MD.var(0) / v_D
    if simplex_fits:
        case["closed_form"] = shares(rest_ratios(v_D, M, bandwidth, damping), v_D)
    case |= {"residual": rest.residual, "moved": rest.moved}
    case |= {"growth_of_empty": None if math.isnan(rest.growth) else rest.growth}
    case |= shares(ratio_D, v_D) | {"held": (ratio_D > EMPTY * ratio_D.max()).sum().item()}
    by_width = [ratio_D[sigma_D == width].mean().item() for width in sigma_D.unique()]
    offset = (rest.particles_MD.mean(0) / sigma_D).square().mean().sqrt().item()
    return case | {"by_width": by_width, "offset": offset, "offset_of_draws": M**-0.5}


def plain_steps() -> dict:
    """The solver's rest against 20,000 of the project's own steps from the same start."""
    sigma_D = widths("half_2x", 40)
    v_D, start_MD, ends = sigma_D**2, draws(sigma_D, 5), {}
    theta_MD = start_MD.clone()
    state = init_state(theta_MD, "sgd")
    for _ in range(20_000):
        svgd_step_(theta_MD, -theta_MD / v_D, state, optimizer="sgd", lr=0.5, damping="matched", backend="reference")
    rest = settle(start_MD, v_D, "median_log", "matched")
    for name, particles_MD in (("plain", theta_MD), ("solver", rest.particles_MD)):
        ends[name] = shares(particles_MD.var(0) / v_D, v_D)
    return {"D": 40, "M": 5, "spectrum": "half_2x", "lr": 0.5, "steps": 20_000, **ends}


def of_a_user() -> dict[str, float]:
    """(3) at a run's size: the mean ratio over the directions, by bandwidth and damping; no simulation."""
    v_D = torch.ones(USER["D"], dtype=torch.float64)
    ways = [("median_log", "none"), ("median_log", "paper"), ("median_log", "matched"), ("median", "paper")]
    return {" ".join(way): rest_ratios(v_D, USER["M"], *way)[0].item() for way in ways}


def measure_all() -> dict[str, list | dict]:
    def many() -> Iterator[dict]:
        for spectrum, M in product(SPECTRA, MS):
            for rule in (*RULES, *PRINTED) if spectrum in ("equal", "half_2x") else RULES:
                yield measure(spectrum, MANY, M, *rule)

    return {
        "cases": [*many(), *(measure(spectrum, FEW, MS[-1], *rule) for spectrum, rule in product(SPECTRA, FEW_RULES))],
        "lambda": [measure("half_2x", MANY, 10, "median_log", lam) for lam in SWEPT],
        "plain_steps": plain_steps(),
        "closed_form_of_a_run": USER | of_a_user(),
    }


def table(cases: Sequence[Mapping]) -> str:
    names = ("mean", "stiffest", "widest", "trace")
    head = "  D spectrum  M  bandwidth  damping " + "".join(f"{name:>10}" for name in names)
    lines = [head + "  held    offset  closed form: mean, widest"]
    for case in cases:
        line = f"{case['D']:3} {case['spectrum']:8} {case['M']:2}  {case['bandwidth']:10} {case['damping']!s:7} "
        if case["apart"]:
            lines.append(line + "  the particles fly apart")
            continue
        closed = case["closed_form"]
        line += "".join(f"{case[name]:10.4f}" for name in names) + f"{case['held']:6}{case['offset']:10.1e}"
        line += f"  {closed['mean']:.4f} {closed['widest']:.4f}" if closed else ""
        lines.append(
            line
            + ("" if case["settled"] else f"  NOT SETTLED: residual {case['residual']:.0e}, moved {case['moved']:.1%}")
        )
    return "\n".join(lines)


def plot(found: Mapping, file: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    with plt.rc_context({"font.size": 12, "axes.titlesize": 13}):
        figure, (by_width, by_lambda, by_rule) = plt.subplots(
            1, 3, figsize=(17, 4.8), width_ratios=(1, 1, 1.6), layout="constrained"
        )
        _draw_widths(by_width, found["cases"])
        _draw_lambdas(by_lambda, found["lambda"])
        _draw_rules(by_rule, found["cases"])
        for axes in (by_width, by_lambda, by_rule):
            axes.axhline(1, color="black", lw=0.8, ls=":")
            axes.spines[["top", "right"]].set_visible(False)
            axes.legend(frameon=False, fontsize=10.5)
        by_width.set_ylabel("particles' variance over the true one")
        figure.savefig(file, dpi=100)
        plt.close(figure)


def _select(cases: Sequence[Mapping], **wanted: object) -> Iterator[Mapping]:
    return (case for case in cases if all(case[key] == value for key, value in wanted.items()))


def _draw_widths(axes, cases: Sequence[Mapping]) -> None:
    sigma_W = widths("log_4", MANY).unique().tolist()
    styles = zip(MS, ("#1f6fb4", "#e08a1e", "#3a3a3a"), ("o", "x", "^"), (9, 6, 5), strict=True)
    for M, colour, marker, size in styles:  # those of 5 and 10 coincide
        chosen = {"D": MANY, "spectrum": "log_4", "M": M, "bandwidth": "median_log", "damping": "matched"}
        (case,) = _select(cases, **chosen)
        axes.plot(sigma_W, case["by_width"], marker=marker, ms=size, mfc="none", lw=1, color=colour, label=f"M = {M}")
    axes.set(xscale="log", xlabel="true width of the direction", title="20 widths, D = 200, matched")
    axes.set_xticks([1, 2, 3, 4], ["1", "2", "3", "4"])
    axes.minorticks_off()


def _draw_lambdas(axes, cases: Sequence[Mapping]) -> None:
    k, c = 1 / 11, math.log(11)
    lambdas = torch.logspace(math.log10(0.0935), 0, 200).tolist()
    of_widest = [2 * ratio_sum(10, lam, c) / MANY for lam in lambdas]
    axes.plot(lambdas, of_widest, color="#1f6fb4", lw=1.2, label="wide half, closed form")
    swept = [case["damping"] for case in cases]
    axes.plot(swept, [case["by_width"][1] for case in cases], "o", color="#1f6fb4", label="wide half")
    axes.plot(swept, [case["by_width"][0] for case in cases], "s", color="#e08a1e", label="stiff half")
    for lam, name in ((0.1018, "matched"), (0.3863, "paper"), (1.0, "none")):
        axes.annotate(name, (lam, 0), (0, -17), textcoords="offset points", ha="center", fontsize=10.5)
    axes.axvspan(0.07, k, color="#eeeeee", lw=0)
    axes.text((0.07 * k) ** 0.5, 3.5, "the particles fly apart", rotation=90, ha="center", va="center", fontsize=10.5)
    axes.set(xscale="log", xlim=(0.07, 1.2), ylim=(-1, 8.5), xlabel="lambda")
    axes.set_title("Half of them 2x wider, M = 10, D = 200")
    axes.set_xticks([0.1, 0.2, 0.5, 1], ["0.1", "0.2", "0.5", "1"])
    axes.minorticks_off()


def _draw_rules(axes, cases: Sequence[Mapping]) -> None:
    groups = [(10, MANY, "median_log", damping) for damping in ("none", "paper", "matched")]
    groups += [(50, FEW, "median_log", "none"), (50, FEW, "median", "none")]
    colours = {"stiffest": "#e08a1e", "mean": "#a8a8a8", "widest": "#1f6fb4"}
    for k, (name, colour) in enumerate(colours.items()):
        values = []
        for M, D, bandwidth, damping in groups:
            chosen = {"M": M, "D": D, "damping": damping, "spectrum": "log_4", "bandwidth": bandwidth}
            values += [case[name] for case in _select(cases, **chosen)]
        label = "all directions" if name == "mean" else f"{name} quarter"
        bars = axes.bar([g + 0.3 * (k - 1) for g in range(len(groups))], values, 0.28, color=colour, label=label)
        axes.bar_label(bars, [f"{value:.2f}" for value in values], fontsize=9)
    titles = [f"{damping}\n{bandwidth}\nM = {M}, D = {D}" for M, D, bandwidth, damping in groups]
    axes.set_xticks(range(len(groups)), titles, fontsize=10)
    axes.set_title("Widths 1 to 4: fewer and more particles than directions")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    out = parser.parse_args().out
    torch.set_num_threads(1)
    found = {
        "date": str(date.today()),
        "versions": {"python": platform.python_version(), "torch": version("torch")},
        "device": "cpu, 1 thread",
        "seeds": [SEED],
        **measure_all(),
    }
    print(table(found["cases"]), table(found["lambda"]), sep="\n\n")
    print(found["plain_steps"], found["closed_form_of_a_run"], sep="\n")
    line = json.dumps(found, allow_nan=False)
    if out:
        out.write_text(line + "\n")
        plot(json.loads(line), out.with_suffix(".png"))
    print(line)


if __name__ == "__main__":
    main()
