"""Verdicts: each rule by a constructed case, and simulated runs of a known truth."""

import json
import math
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from paperlib.gates import Gate
from scipy import integrate
from scipy import stats as scipy_stats

from benchmarks import claims as simulations
from paperlib import claims, claims_2020, experiments, verdicts
from paperlib.runs import RunRecord, Store

N = 10
WOBBLE = np.array([0.3, -0.3, 0.2, -0.2, 0.1, -0.1, 0.25, -0.25, 0.05, -0.05])  # its mean is 0


def registered(figure: str, network: str, **columns: dict[str, object]) -> pd.DataFrame:
    """Runs of a figure, ten seeds: columns are dicts of setting -> values; "_" of all others."""
    settings = list(columns["accuracy"])
    frame = pd.DataFrame(
        [(setting, seed) for setting in settings for seed in range(N)],
        columns=["setting", "seed"],
    )
    frame = frame.assign(
        figure=figure,
        network=network,
        label=frame.setting.str.upper(),
        run=[f"{figure}.{network}.{s}.{k}" for s, k in zip(frame.setting, frame.seed, strict=True)],
        choosing=False,
        done=True,
        finite=True,
    )
    for name, values in columns.items():
        parts = [np.broadcast_to(values.get(s, values.get("_", 0.0)), N) for s in settings]
        frame[name] = np.concatenate(parts).astype(float)
    return frame.assign(best_accuracy=frame.accuracy + 1)


STABILITY = {"smallest 4": 99 + WOBBLE, "smallest 40": 97 - WOBBLE, "largest 40": 95.0, "_": 100.0}


def t1_runs(s4=80.0, s40=80.0, l40=80.0, none=80.0, stability=None) -> pd.DataFrame:
    accuracy = {"smallest 4": s4, "smallest 40": s40, "largest 40": l40, "none": none}
    return registered(
        "figure-2", "VGG11", accuracy=accuracy, mean_stability=STABILITY | (stability or {})
    )


def conv4_runs(large=80.0, small=80.0, none=80.0) -> pd.DataFrame:
    accuracy = {"largest 0.9": large, "smallest 0.9": small, "none": none}
    return registered("figure-R1", "conv4", accuracy=accuracy)


def failing(name: str, figure: str, network: str) -> Gate:
    return Gate(name, network, figure, "S", False, 1.5, "too little")


def contrasts(claim: claims.Claim, kind: str = "co-primary") -> list[verdicts.Contrast]:
    return [contrast for contrast in claim.contrasts if contrast.kind == kind]


# Contrasts


def test_contrasts_are_paired_t_tests():
    rng = np.random.default_rng(0)
    accuracy = {
        s: rng.normal(80, 1, N) for s in ("smallest 4", "smallest 40", "largest 40", "none")
    }
    runs = registered("figure-2", "VGG11", accuracy=accuracy, mean_stability=STABILITY)
    claim = claims.t1(runs.sample(frac=1, random_state=0), ())
    assert [c.name for c in contrasts(claim)] == ["LARGEST 40 - SMALLEST 4", "LARGEST 40 - NONE"]
    for contrast, other in zip(contrasts(claim), ("smallest 4", "none"), strict=True):
        result = scipy_stats.ttest_rel(accuracy["largest 40"], accuracy[other])
        difference = accuracy["largest 40"] - accuracy[other]
        flips = scipy_stats.permutation_test(
            (difference,), np.mean, permutation_type="samples", n_resamples=np.inf
        )
        assert contrast.fitted.value == pytest.approx(difference.mean())
        assert contrast.fitted.interval() == pytest.approx(tuple(result.confidence_interval()))
        assert contrast.p == pytest.approx(result.pvalue)
        assert contrast.sign_flip == pytest.approx(flips.pvalue)
        assert (contrast.n, contrast.registered, contrast.dropped) == (N, N, 0)


def test_secondary_contrasts_are_corrected_together():
    rng = np.random.default_rng(1)
    runs = t1_runs(*rng.normal(80, 1, (4, N)))
    runs["best_accuracy"] += rng.normal(0, 0.3, len(runs))
    claim = claims.t1(runs, ())
    secondary = contrasts(claim, "secondary")
    assert sum(contrast.outcome == "best_accuracy" for contrast in secondary) == 2
    assert len(secondary) == 2 + 4 + 2  # best accuracy, the other pairs, two slopes
    order = sorted(secondary, key=lambda contrast: contrast.p)
    highest = 0.0
    for rank, contrast in enumerate(order):
        highest = max(highest, min(1, contrast.p * (len(order) - rank)))
        assert contrast.holm == pytest.approx(highest)
    assert all(math.isnan(c.holm) for c in claim.contrasts if c.kind != "secondary")


def difference(mean: float, sd: float = 0.3, n: int = N, **how: object) -> verdicts.Contrast:
    values = np.random.default_rng(0).normal(0, 1, n)
    values = mean + sd * (values - values.mean()) / values.std(ddof=1)
    return verdicts.paired("a - b", values, **how)


# Half widths at n = 10 and an SD of 0.3: 0.174 at 90%, 0.215 at 95%, 0.255 at 97.5%.
@pytest.mark.parametrize(
    ("means", "expected"),
    [
        ((0.22, 0.22), "supported"),
        ((0.22, 0.21), "negligible"),
        ((0.40, 0.21), "undecided"),
        ((0.0, 0.22), "negligible"),
        ((0.32, 0.32), "supported"),
        ((0.32, 0.0), "negligible"),
        ((0.34, 0.0), "undecided"),
        ((-0.25, 0.0), "negligible"),
        ((-0.26, 0.0), "contradicted"),
        ((-0.26, 0.22), "mixed"),
        ((-0.25, 0.22), "negligible"),
        ((-0.25, 0.40), "undecided"),
        ((-0.22,), "contradicted"),
        ((-0.21,), "negligible"),
    ],
)
def test_the_first_verdict_that_applies(means, expected):
    primary = [difference(mean) for mean in means]
    assert verdicts.verdict(primary, 0.5) == expected
    without = verdicts.verdict(primary, None)
    assert without == ("undecided" if expected == "negligible" else expected)


def test_a_claim_may_be_of_something_lower():
    assert verdicts.verdict([difference(-0.22, sign=-1)], None) == "supported"
    assert verdicts.verdict([difference(0.22, sign=-1)], None) == "contradicted"


def test_not_worse_by_delta():
    assert verdicts.verdict([difference(-0.28, null=-0.5)], 0.5) == "supported"
    assert verdicts.verdict([difference(-0.29, null=-0.5)], 0.4) == "undecided"
    assert verdicts.verdict([difference(-0.72, null=-0.5)], 0.5) == "contradicted"
    assert difference(-0.5, null=-0.5).p == pytest.approx(1)


@pytest.mark.parametrize(
    ("mean", "expected"),
    [
        *[(0, "supported"), (0.82, "supported"), (-0.82, "supported"), (0.83, "undecided")],
        *[(1, "undecided"), (1.21, "undecided"), (1.22, "contradicted"), (-1.22, "contradicted")],
    ],
)
def test_equivalence(mean, expected):
    assert verdicts.verdict([difference(mean, margin=1.0)], 1.0) == expected


@pytest.mark.parametrize(
    ("lost", "expected"), [(0, "supported"), (1, "supported"), (2, "undecided")]
)
def test_more_than_one_pair_in_ten_dropped_decides_nothing(lost, expected):
    runs = conv4_runs(large=82 + WOBBLE)
    runs.loc[(runs.setting == "largest 0.9") & (runs.seed < lost), "finite"] = False
    runs.loc[~runs.finite, ["accuracy", "best_accuracy"]] = np.nan
    claim = claims.r1(runs, ())
    assert claim.verdict == expected
    assert {(c.n, c.dropped) for c in contrasts(claim)} == {(N - lost, lost)}
    kept = WOBBLE[lost:].mean()
    assert contrasts(claim)[0].fitted.value == pytest.approx(2 + kept)
    assert claim.n == "30 of 30"


def test_runs_at_chance_count():
    runs = conv4_runs(large=82 + WOBBLE)
    runs.loc[(runs.setting == "largest 0.9") & (runs.seed == 0), "accuracy"] = 10.0
    claim = claims.r1(runs, ())
    assert contrasts(claim)[0].fitted.value == pytest.approx(2 - 7.2 - 0.03, abs=1e-9)
    assert claim.verdict == "undecided"


# Power


@pytest.mark.parametrize("sd", [0.6, 0.85, 1.5])
def test_power_of_one_contrast(sd):
    contrast = difference(0.3, sd)
    values = np.random.default_rng(0).normal(0, 1, N)
    values = 0.3 + sd * (values - values.mean()) / values.std(ddof=1)
    rule = verdicts.supports_all([contrast])
    power = verdicts.power(values[None], [1.0], rule, draws=20_000)
    noncentral = scipy_stats.nct(N - 1, math.sqrt(N) / sd)
    assert power == pytest.approx(noncentral.sf(scipy_stats.t.ppf(0.975, N - 1)), abs=0.012)


def test_power_of_equivalence():
    """P(|mean| < 1 - t s / sqrt(n)), integrated over the distribution of s."""
    sd = 0.85
    contrast = difference(0.3, sd, margin=1.0)
    values = np.random.default_rng(0).normal(0, 1, N)
    values = sd * (values - values.mean()) / values.std(ddof=1)
    power = verdicts.power(values[None], [0.0], verdicts.supports_all([contrast]), draws=20_000)

    def at(chi: float) -> float:
        s = sd * math.sqrt(chi / (N - 1))
        room = 1 - scipy_stats.t.ppf(0.95, N - 1) * s / math.sqrt(N)
        inside = max(0.0, 2 * scipy_stats.norm.cdf(room * math.sqrt(N) / sd) - 1)
        return inside * scipy_stats.chi2.pdf(chi, N - 1)

    assert power == pytest.approx(integrate.quad(at, 0, 60)[0], abs=0.012)


def test_power_of_two_contrasts_counts_that_they_go_together():
    """The same differences twice have the power of one; independent ones its square."""
    one = difference(0.3, 0.85)
    rng = np.random.default_rng(3)
    values = np.linalg.qr(np.column_stack([np.ones(N), rng.normal(0, 1, (N, 2))]))[0][:, 1:].T
    values *= 0.85 * math.sqrt(N - 1)
    power = [
        verdicts.power(v, [1.0] * len(v), verdicts.supports_all([one] * len(v)), draws=20_000)
        for v in (values[:1], np.stack([values[0], values[0]]), values)
    ]
    assert power[1] == pytest.approx(power[0], abs=0.012)
    assert power[2] == pytest.approx(power[0] ** 2, abs=0.012)


def test_no_power_of_one_pair():
    rule = verdicts.supports_all([difference(0.3)])
    assert math.isnan(verdicts.power(np.array([[1.0, np.nan]]), [1.0], rule))


# What each claim compares


def test_incomplete_claims_read_no_number():
    """Without the columns of numbers there is nothing to read; and nothing is shown."""
    columns = ["figure", "network", "setting", "label", "seed", "choosing", "run"]
    for name, claim in claims.CLAIMS.items():
        figures = simulations.FIGURES["R2" if name == "R3" else name]
        plans = [experiments.plan(figure, "small").assign(figure=figure) for figure in figures]
        runs = pd.concat(plans, ignore_index=True)[columns].assign(done=True, finite=True)
        network = "conv4" if name.startswith("R") else "VGG11"
        last = runs[(runs.figure == figures[0]) & (runs.network == network)].iloc[-1]
        runs.loc[runs.run == last.run, "done"] = False
        found = claim(runs, [failing("G2", figures[0], network)])
        assert found.verdict == "incomplete"
        assert (found.contrasts, found.gates, found.notes) == ((), (), ())
        assert math.isnan(found.power)
        assert found.done == found.registered - 1
        assert found.n == f"{found.done} of {found.registered}"


def test_without_any_run_a_claim_is_incomplete():
    for claim in claims.CLAIMS.values():
        found = claim(t1_runs().iloc[:0], ())
        assert (found.verdict, found.n) == ("incomplete", "0 of 0")


GATED = {
    "T1": ("figure-2", "VGG11", ("G1", "G2", "G3", "G4")),
    "T2": ("figure-3", "VGG11", ("G2", "G3", "G4")),
    "T3": ("figure-5", "VGG11", ("G1", "share")),
    "T4": ("figure-6", "VGG11", ("G1", "G3", "G4")),
    "T5": ("figure-D2", "VGG11", ("G1",)),
    "R1": ("figure-R1", "conv4", ("G1", "G2")),
    "R2": ("figure-R1", "conv4", ("G2",)),
    "R4": ("figure-R1", "conv4", ("G2",)),
}


@pytest.mark.parametrize("name", GATED)
def test_a_gate_that_fails_voids_its_claims_only(name):
    figure, network, own = GATED[name]
    runs = simulations.simulate(name, "effect", np.random.default_rng(0))
    judge = claims.CLAIMS[name]
    plain = judge(runs, (), secondary=False)
    for gate in ("G1", "G2", "G3", "G4", "share"):
        claim = judge(runs, [failing(gate, figure, network)], secondary=False)
        if gate in own:
            assert (claim.verdict, claim.contrasts) == ("not testable", ())
            assert claim.gates[0].number == 1.5
        else:
            assert claim.verdict == plain.verdict
        for elsewhere in (failing(gate, "figure-1", network), failing(gate, figure, "ResNet9")):
            assert judge(runs, [elsewhere], secondary=False).verdict == plain.verdict
    passing = [replace(failing(gate, figure, network), passed=None) for gate in own]
    assert judge(runs, passing, secondary=False).gates[: len(passing)] == tuple(passing)


@pytest.mark.parametrize("name", [*GATED, "R3"])
def test_a_profile_without_the_settings_cannot_test(name):
    runs = simulations.simulate("R2" if name == "R3" else name, "effect", np.random.default_rng(0))
    lost = runs[~runs.setting.str.startswith(("largest", "zeroing 1106", "none"))]
    claim = claims.CLAIMS[name](lost, ())
    assert (claim.verdict, claim.contrasts) == ("not testable", ())


def test_t1_goes_by_stability_as_measured():
    """Whatever the settings are called: here S 13% is least and L 13% most stable."""
    stability = {"smallest 40": 94 + WOBBLE, "largest 40": 99.5 + WOBBLE, "smallest 4": 97.0}
    claim = claims.t1(t1_runs(s40=82 + WOBBLE, l40=80.5, stability=stability), ())
    assert [c.name for c in contrasts(claim)] == ["SMALLEST 40 - LARGEST 40", "SMALLEST 40 - NONE"]
    assert claim.verdict == "supported"
    swapped = claims.t1(t1_runs(l40=82 + WOBBLE, s40=80 - WOBBLE, stability=stability), ())
    assert swapped.verdict == "contradicted"


def test_t1_needs_stabilities_that_differ():
    same = {
        setting: 97 + WOBBLE * sign for setting, sign in zip(STABILITY, (1, -1, 2), strict=False)
    }
    claim = claims.t1(t1_runs(l40=82 + WOBBLE, stability=same), ())
    assert (claim.verdict, claim.contrasts) == ("not testable", ())
    assert [(gate.gate, gate.passed) for gate in claim.gates] == [("G5", False)]


def test_t1_shows_a_secondary_pair_whose_stabilities_do_not_differ():
    claim = claims.t1(t1_runs(l40=82 + WOBBLE, stability={"smallest 40": 99 - WOBBLE}), ())
    noted = [c.name for c in contrasts(claim, "secondary") if "G5" in c.note]
    assert noted in (["SMALLEST 40 - SMALLEST 4"], ["SMALLEST 4 - SMALLEST 40"])


def test_t1_that_has_no_fit_is_no_error():
    claim = claims.t1(t1_runs(), ())
    slopes = [c for c in contrasts(claim, "secondary") if "on mean stability" in c.name]
    assert len(slopes) == 2
    assert claim.verdict == "negligible"


def test_t1_verdicts():
    up = {"l40": 82 + WOBBLE, "s40": 81.0}
    assert claims.t1(t1_runs(**up), ()).verdict == "supported"
    assert claims.t1(t1_runs(**up, none=81.9), ()).verdict == "undecided"
    assert claims.t1(t1_runs(**up, none=84.0), ()).verdict == "mixed"
    assert claims.t1(t1_runs(**up, s4=84.0, none=84.0), ()).verdict == "contradicted"


# T2


@pytest.mark.parametrize(
    ("p", "p_against", "supported", "contradicted"),
    [(0.024, 0.98, True, False), (0.98, 0.024, False, True), (0.98, 0.026, False, False)],
)
def test_a_permutation_test_decides_by_its_one_sided_p(p, p_against, supported, contradicted):
    """A tie with the data counts against either verdict."""
    contrast = replace(difference(0.0), p=p, p_against=p_against)
    assert (contrast.supported, contrast.contradicted(0.975)) == (supported, contradicted)


def t2_runs(seed: int = 0, truth: str = "effect") -> pd.DataFrame:
    return simulations.simulate("T2", truth, np.random.default_rng(seed))


def test_t2_is_supported_if_both_parts_are():
    runs = t2_runs()
    claim = claims.t2(runs, (), draws=500)
    assert claim.verdict == "supported"
    permuted, together = contrasts(claim)
    assert (permuted.n, permuted.registered, permuted.dropped) == (21, 21, 0)
    assert together.n == 40
    assert 0.8 < claim.power <= 1
    assert [c.outcome for c in contrasts(claim, "secondary")] == ["best_accuracy"] * 2
    reverse = runs.assign(accuracy=160 - runs.accuracy)
    assert claims.t2(reverse, (), secondary=False, draws=500).verdict == "contradicted"
    half = runs.assign(accuracy=runs.accuracy.where(runs.figure == "figure-3", reverse.accuracy))
    assert claims.t2(half, (), secondary=False, draws=500).verdict == "mixed"


def test_t2_orders_the_targets_of_each_rate():
    """The statistic from scipy's tau of the targets' means, rate by rate."""
    runs = t2_runs(truth="no effect")
    mine = runs[runs.figure == "figure-3"]
    means = mine.groupby("setting")[["mean_stability", "accuracy"]].mean()
    taus = [
        scipy_stats.kendalltau(*means[means.index.str.endswith(f" {period}")].T.to_numpy())
        for period in claims_2020.PERIODS
    ]
    permuted = contrasts(claims.t2(runs, (), draws=50))[0]
    assert permuted.fitted.value == pytest.approx(sum(tau.statistic for tau in taus))
    assert math.isnan(permuted.fitted.error)


def test_t2_networks_are_eight_paired_differences():
    runs = t2_runs()
    each = contrasts(claims.t2(runs, (), draws=500), "described")
    assert len(each) == 8
    for contrast, (figure, network, settings) in zip(each, claims_2020.NETWORKS, strict=True):
        mine = runs[(runs.figure == figure) & (runs.network == network)]
        wide = mine.pivot(index="seed", columns="setting", values="accuracy")
        stable = mine.groupby("setting").mean_stability.mean()
        pair = settings
        if len(settings) == 3:
            ranked = stable[list(settings)].sort_values().index
            pair = (ranked[0], ranked[-1])
        result = scipy_stats.ttest_rel(wide[pair[0]], wide[pair[1]])
        assert contrast.fitted.interval() == pytest.approx(tuple(result.confidence_interval()))
        assert contrast.n == 5


def test_t2_figure_4_and_c3_have_a_fixed_direction():
    runs = t2_runs()
    turned = runs.assign(mean_stability=200 - runs.mean_stability)
    fixed = runs.figure.isin(["figure-4", "figure-C3"])
    turned = turned.where(fixed, runs)
    assert contrasts(claims.t2(turned, (), draws=500))[1].fitted == (
        contrasts(claims.t2(runs, (), draws=500))[1].fitted
    )


def test_t2_leaves_out_networks_before_their_accuracies_are_read():
    """Runs without accuracies stand for those that must not be read."""
    runs = t2_runs()
    out = [("figure-2", "ResNet18"), ("figure-4", "ResNet56"), ("table-C1", "ResNet18")]
    gates = [failing("G3", *place) for place in out]
    unread = runs.copy()
    for figure, network in out:
        of = (unread.figure == figure) & (unread.network == network)
        unread.loc[of, ["accuracy", "best_accuracy"]] = np.inf
    claim = claims.t2(unread, gates, draws=500)
    assert len(contrasts(claim, "described")) == 5
    assert contrasts(claim)[1].n == 25
    assert len(claim.notes) == 3
    assert claim.verdict == "supported"


@pytest.mark.parametrize(("kept", "verdict"), [(3, "supported"), (2, "not testable")])
def test_t2_needs_three_networks(kept, verdict):
    gates = [failing("G2", figure, network) for figure, network, _ in claims_2020.NETWORKS[kept:]]
    claim = claims.t2(t2_runs(), gates, secondary=False, draws=500)
    assert claim.verdict == verdict
    assert bool(claim.contrasts) == (verdict != "not testable")


def test_t2_drops_the_seed_of_a_rate():
    runs = t2_runs()
    of = (runs.figure == "figure-3") & (runs.setting == "random 60") & (runs.seed == 1)
    runs.loc[of, "finite"] = False
    permuted = contrasts(claims.t2(runs, (), draws=500))[0]
    assert (permuted.n, permuted.dropped) == (20, 1)


# T3, T5


def noise_runs(figure: str, **accuracy: object) -> pd.DataFrame:
    names = {
        "figure-5": [
            f"{kind} {span}" for kind in ("zeroing", "gaussian") for span in (0, 51, 1106)
        ],
        "figure-D2": ["restored 2480"],
    }
    settings = dict.fromkeys([*names[figure], "none", "largest 40 weights"], 80.0)
    given = {name.replace("_", " "): value for name, value in accuracy.items()}
    return registered(figure, "VGG11", accuracy=settings | given)


def test_t3_is_of_both_kinds_of_noise():
    both = {"zeroing_1106": 81 + WOBBLE, "gaussian_1106": 81 - WOBBLE}
    assert claims.t3(noise_runs("figure-5", **both), ()).verdict == "supported"
    one = both | {"gaussian_1106": 80 + WOBBLE}
    assert claims.t3(noise_runs("figure-5", **one), ()).verdict == "undecided"
    worse = both | {"gaussian_1106": 79 + WOBBLE}
    assert claims.t3(noise_runs("figure-5", **worse), ()).verdict == "mixed"
    assert claims.t3(noise_runs("figure-5"), ()).verdict == "negligible"


def test_t3_trend_over_spans():
    """The least-squares slope on log10(1 + span), of each seed that has all three."""
    rng = np.random.default_rng(0)
    values = {f"zeroing_{span}": rng.normal(80, 1, N) for span in (0, 51, 1106)}
    runs = noise_runs("figure-5", **values)
    runs = runs[(runs.setting != "zeroing 51") | (runs.seed < 5)]
    claim = claims.t3(runs, ())
    spans = np.log10([1, 52, 1107])
    by_seed = np.array(list(values.values()))[:, :5]
    slopes = [scipy_stats.linregress(spans, of).slope for of in by_seed.T]
    trend = next(c for c in contrasts(claim, "secondary") if c.name.startswith("zeroing"))
    assert trend.fitted.value == pytest.approx(np.mean(slopes))
    assert trend.n == trend.registered == 5
    result = scipy_stats.ttest_1samp(slopes, 0)
    assert trend.p == pytest.approx(result.pvalue)
    not_worse = [c for c in contrasts(claim, "secondary") if c.null == -0.5]
    assert len(not_worse) == 2


def t5(restored: float, weights: float) -> str:
    accuracy = {"restored_2480": restored + WOBBLE, "largest_40_weights": weights - WOBBLE}
    return claims.t5(noise_runs("figure-D2", **accuracy), ()).verdict


def test_t5_verdicts():
    assert t5(81, 81) == "supported"
    assert t5(83, 83) == "supported"
    assert t5(81, 80) == "no premise"
    assert t5(81, 79) == "no premise"
    assert t5(80, 81) == "contradicted"  # worse than Prune_L by more than delta
    assert t5(81, 83) == "mixed"
    assert t5(80.5, 80.9) == "undecided"


def test_t5_shows_its_premise():
    runs = noise_runs("figure-D2", largest_40_weights=79 + WOBBLE)
    claim = claims.t5(runs, ())
    (premise,) = contrasts(claim, "premise")
    assert premise.fitted.value == pytest.approx(-1)
    assert premise.name == "LARGEST 40 WEIGHTS - NONE"


# T4


def t4_runs(fall: float = 0.3, by_loss: float = 0.0, sign: float = 1.0) -> pd.DataFrame:
    """log Tr(H) and log Tr(C) fall by `fall` for L, apart from `by_loss` times its log loss."""
    loss = 1 + np.random.default_rng(0).normal(0, 0.5, N)
    logs = -fall - by_loss * loss + 0.2 * WOBBLE
    return registered(
        "figure-6",
        "VGG11",
        accuracy=dict.fromkeys(("smallest 4", "smallest 40", "largest 40", "none"), 80.0),
        mean_stability=STABILITY,
        curvature={"largest 40": 300 * np.exp(logs), "_": 300.0},
        noise={"largest 40": 2000 * np.exp(sign * logs), "_": 2000.0},
        train_loss={"largest 40": 0.001 * np.exp(loss), "_": 0.001},
        delta_w={"largest 40": 0.08 + 0.01 * WOBBLE, "_": 0.05},
    )


def test_t4_verdicts():
    assert claims.t4(t4_runs(), ()).verdict == "supported"
    assert claims.t4(t4_runs(fall=-0.3), ()).verdict == "contradicted"
    assert claims.t4(t4_runs(sign=-1), ()).verdict == "mixed"
    assert claims.t4(t4_runs(fall=0), ()).verdict == "undecided"  # never negligible
    assert claims.t4(t4_runs(fall=0, by_loss=1), ()).verdict == "not apart from training loss"


def test_t4_adjusts_for_training_loss():
    runs = t4_runs(by_loss=0.4)
    claim = claims.t4(runs, ())
    logs = runs.assign(curvature=np.log(runs.curvature), train_loss=np.log(runs.train_loss))
    wide = logs.pivot(index="seed", columns="setting", values=["curvature", "train_loss"])
    y, x = (wide[c]["largest 40"] - wide[c]["smallest 4"] for c in ("curvature", "train_loss"))
    line = scipy_stats.linregress(x, y)
    adjusted = contrasts(claim, "adjusted")[0]
    assert adjusted.fitted[:2] == pytest.approx((line.intercept, line.intercept_stderr))
    assert adjusted.fitted.freedom == N - 2
    assert contrasts(claim)[0].fitted.value == pytest.approx(y.mean())
    assert [c.outcome for c in contrasts(claim, "secondary")] == ["delta_w"]
    assert len(contrasts(claim, "described")) == 4


def test_t4_drops_a_pair_without_a_logarithm():
    runs = t4_runs()
    runs.loc[(runs.setting == "largest 40") & (runs.seed == 0), "curvature"] = -1.0
    claim = claims.t4(runs, ())
    assert [c.dropped for c in contrasts(claim)] == [1, 0]
    assert claim.verdict == "supported"


# R1 to R4


def test_r1_waits_with_secondary_contrasts_only():
    runs = simulations.simulate("R1", "effect", np.random.default_rng(0))
    claim = claims.r1(runs, ())
    by_fraction = [c for c in contrasts(claim, "secondary") if c.outcome == "accuracy"]
    assert len(by_fraction) == 12
    assert {c.n for c in by_fraction} == {3}
    runs.loc[(runs.figure == "figure-R3") & (runs.setting == "random 0.5"), "done"] = False
    waiting = claims.r1(runs, ())
    assert (waiting.verdict, waiting.power) == (claim.verdict, claim.power)
    assert contrasts(waiting, "secondary") == []
    assert len(waiting.notes) == 1


def dropout_runs(choosing: dict[str, float], compared: dict[str, float]) -> pd.DataFrame:
    """Prune_L at 80 in figure R-1; R-4's dropouts, with other accuracies on seeds 10 to 14."""
    r1 = registered("figure-R1", "conv4", accuracy={"largest 0.9": 80 + WOBBLE})
    r4 = registered("figure-R4", "conv4", accuracy=compared)
    chosen = registered("figure-R4", "conv4", accuracy=choosing).query("seed < 5")
    chosen = chosen.assign(seed=chosen.seed + 10, choosing=True, run=chosen.run + ".choosing")
    return pd.concat([r1, r4, chosen], ignore_index=True)


A, B, C = "dropout 0.25/0", "dropout 0/0.5", "dropout 0.25/0.5"


@pytest.mark.parametrize(
    ("choosing", "best"),
    [((70, 71, 72), C), ((70, 72, 71), B), ((72, 71, 70), A), ((70, 71, 71), B), ((70, 70, 70), A)],
)
def test_r2_chooses_dropout_on_seeds_of_its_own(choosing, best):
    """On a tie the lower rates. Seeds 0 to 9, on which another dropout is best, do not choose."""
    compared = {A: 77.0, B: 78.0, C: 79.0}
    claim = claims.r2(dropout_runs(dict(zip((A, B, C), choosing, strict=True)), compared), ())
    (contrast,) = contrasts(claim)
    assert contrast.name == f"LARGEST 0.9 - {best.upper()}"
    assert contrast.fitted.value == pytest.approx(80 - compared[best])
    assert contrast.n == N
    assert claim.verdict == "supported"


def test_r3_is_r2_at_its_size():
    runs = dropout_runs({A: 70, B: 71, C: 72}, {A: 77.0, B: 78.0, C: 79.0})
    none = registered("figure-R1", "conv4", accuracy={"none": 79.0})
    runs = pd.concat([runs, none], ignore_index=True)
    sizes = {"largest 0.9": 189_175, "none": 1_250_858}
    claim = claims.r3(runs.assign(parameters=runs.setting.map(sizes)), ())
    expected = claims.r2(runs, ())
    assert (claim.name, claim.verdict) == ("R3", expected.verdict)
    assert claims.to_dict(claim)["contrasts"] == claims.to_dict(expected)["contrasts"]
    assert any("84.9" in note for note in claim.notes)


@pytest.mark.parametrize(
    ("small", "verdict"),
    [
        *[(80.0, "supported"), (80.8, "supported"), (81.0, "undecided"), (79.0, "undecided")],
        *[(81.3, "contradicted"), (78.7, "contradicted")],
    ],
)
def test_r4_is_equivalence_within_a_point(small, verdict):
    assert claims.r4(conv4_runs(small=small + WOBBLE), ()).verdict == verdict


def test_r1_verdicts():
    assert claims.r1(conv4_runs(large=81 + WOBBLE), ()).verdict == "supported"
    assert claims.r1(conv4_runs(large=80.8 + WOBBLE, none=80.75), ()).verdict == "negligible"
    assert claims.r1(conv4_runs(large=81 + WOBBLE, none=82), ()).verdict == "mixed"


# Frames


def test_one_row_a_contrast():
    found = [claims.r1(conv4_runs(large=81 + WOBBLE), ()), claims.t1(t1_runs(), ())]
    found.append(claims.t3(noise_runs("figure-5").assign(done=False), ()))
    frame = claims.to_frame(found)
    assert len(frame) == sum(len(claim.contrasts) for claim in found) + 1
    row = frame[frame.claim == "R1"].iloc[0]
    first = contrasts(found[0])[0]
    assert (row.contrast, row.estimate, row.low) == (
        first.name,
        first.fitted.value,
        first.fitted.interval()[0],
    )
    last = frame.iloc[-1]
    assert (last.claim, last.verdict, last.runs) == ("T3", "incomplete", "0 of 80")
    assert last.drop(["claim", "verdict", "runs"]).isna().all()


def test_claims_as_json():
    runs = t1_runs(l40=82 + WOBBLE)
    claim = claims.t1(runs, [replace(failing("G1", "figure-2", "VGG11"), passed=True)])
    content = json.loads(json.dumps(claims.to_dict(claim), allow_nan=False))
    assert content["verdict"] == claim.verdict
    assert content["gates"][0] == {"gate": "G1", "network": "VGG11", "figure": "figure-2"} | {
        "setting": "S",
        "passed": True,
        "number": 1.5,
        "text": "too little",
    }
    row = content["contrasts"][0]
    assert row["estimate"] == pytest.approx(contrasts(claim)[0].fitted.value)
    incomplete = claims.to_dict(claims.t1(runs.assign(done=False), ()))
    assert incomplete["power"] is None


# From a store


def record(config, accuracy: float) -> RunRecord:
    """A run that learns everything, of constant test accuracy."""
    n = config.epochs
    last = getattr(config.pruning, "epochs", ())
    events = set(last) if last and isinstance(last[0], int) else set(last[-1] if last else ())
    epochs = pd.DataFrame(
        {
            "epoch": range(n),
            "trained": True,
            "learning_rate": 0.001,
            "train_loss": 0.001,
            "train_accuracy": 100.0,
            "test_loss": 1.0,
            "pre": accuracy,
            "post": accuracy,
            "removed": [int(epoch in events) for epoch in range(n)],
            "seconds": 0.1,
        }
    )
    arrays = {}
    if config.flatness is not None:
        epsilons = np.array(config.flatness.epsilons)
        arrays = {
            "eigenvalues": np.array([2.0, 1.0], "float32"),
            "noise": np.float32(7),
            "epsilons": epsilons,
            "losses": np.ones((2, len(epsilons))),
        }
    held = 900 if config.pruning is not None else 0
    return RunRecord(config, epochs, arrays, {"parameters": 1000, "held": held, "device": "cpu"})


@pytest.fixture
def store(tmp_path) -> Store:
    """Demo's runs of figures R-1, R-4 and 6, Prune_L 3 points better."""
    store = Store(tmp_path / "runs", tmp_path / "results")
    rng = np.random.default_rng(0)
    for figure in ("figure-R1", "figure-R4", "figure-6"):
        for row in experiments.plan(figure, "demo").itertuples():
            if row.run not in store:
                better = 3 * row.setting.startswith("largest")
                store.write(record(row.config, 80 + better + 0.01 * rng.normal()))
    return store


def test_judged_from_a_store(store):
    found = {claim.name: claim for claim in claims.judge("demo", store=store)}
    assert list(found) == list(claims.CLAIMS)
    assert {n for n, claim in found.items() if claim.verdict == "incomplete"} == {"T2", "T3", "T5"}
    assert [found[n].verdict for n in ("R1", "R2", "R3", "R4")] == ["supported"] * 4
    assert found["R1"].contrasts[0].fitted.value == pytest.approx(3, abs=0.1)
    assert {gate.gate for gate in found["R1"].gates} == {"G1", "G2"}
    assert any("90.0%" in note for note in found["R3"].notes)
    assert found["T4"].done == found["T4"].registered == 12
    assert {gate.gate for gate in found["T4"].gates} >= {"G1", "G3", "G4"}


def test_runs_that_are_missing_damaged_or_failed(store):
    plan = experiments.plan("figure-R1", "demo").set_index(["setting", "seed"])
    large, small = (plan.loc[(f"{target} 0.9", 0)] for target in ("largest", "smallest"))
    (store.path / "records" / f"{small.run}.parquet").write_bytes(b"damaged")
    (claim,) = (c for c in claims.judge("demo", store=store) if c.name == "R1")
    assert (claim.verdict, claim.n, claim.contrasts) == ("incomplete", "9 of 10", ())
    store.write(record(small.config, 80.0))
    (store.path / "records" / f"{large.run}.parquet").unlink()
    store.fail(large.config, "out of memory")
    (claim,) = (c for c in claims.judge("demo", store=store) if c.name == "R1")
    assert claim.n == "9 of 10"
    store.fail(large.config, f"the loss of {large.config.title} is nan at epoch 3")
    (claim,) = (c for c in claims.judge("demo", store=store) if c.name == "R1")
    assert (claim.verdict, claim.n) == ("undecided", "10 of 10")
    assert claim.contrasts[0].dropped == 1


def test_flatness_is_read_for_t4_only_when_all_is_there(store, monkeypatch):
    runs, _ = claims.load("demo", store=store)
    flat = runs[(runs.figure == "figure-6") & (runs.network == "VGG11")]
    config = flat.config.iloc[0].flatness
    assert flat.curvature.tolist() == [3] * 12
    assert flat.noise.tolist() == [7] * 12
    assert flat.delta_w.to_numpy() == pytest.approx(config.reach + config.step)  # never reached
    assert flat.train_loss.tolist() == [0.001] * 12
    assert runs.curvature.notna().sum() == 12
    (store.path / "records" / f"{flat.run.iloc[0]}.parquet").unlink()
    (store.path / "records" / f"{flat.run.iloc[0]}.npz").unlink()
    monkeypatch.setattr(Store, "records", lambda *_: pytest.fail("arrays were read"))
    runs, _ = claims.load("demo", store=store)
    assert runs.curvature.isna().all()


def test_a_run_whose_arrays_were_left_out_is_not_done_for_t4(store):
    runs, _ = claims.load("demo", store=store)
    first = runs[runs.figure == "figure-6"].iloc[0]
    epochs = store.epochs([first.run]).drop(columns="run")
    for kind in ("parquet", "npz"):
        (store.path / "records" / f"{first.run}.{kind}").unlink()
    store.write(RunRecord(first.config, epochs))
    found = {claim.name: claim for claim in claims.judge("demo", store=store)}
    assert found["T4"].n == "11 of 12"


def test_judging_an_empty_store_at_every_profile(tmp_path):
    for profile in experiments.PROFILES:
        found = claims.judge(profile, store=Store(tmp_path / "runs", tmp_path / "results"))
        assert {claim.verdict for claim in found} == {"incomplete"}
        assert all(claim.done == 0 < claim.registered for claim in found)


# Simulated runs of a known truth. Counts may leave their bounds once in 10,000 data sets.


def count(claim: str, truth: str, simulated: int, *names: str) -> int:
    found = [new for new, _ in simulations.verdicts(claim, truth, simulated, draws=300)]
    return sum(name in names for name in found)


SIMULATED = dict.fromkeys(simulations.FIGURES, 80) | {"T2": 30, "T4": 50}


@pytest.mark.parametrize("claim", simulations.FIGURES)
def test_false_verdicts_are_rare(claim):
    """At most 5%; R4, which lies on the border of its two verdicts, 5% and 2.5%."""
    simulated = SIMULATED[claim]
    false = count(claim, "no effect", simulated, "supported", "contradicted", "mixed")
    rate = 0.075 if claim == "R4" else 0.05
    assert false <= scipy_stats.binom.ppf(1 - 1e-4, simulated, rate)


@pytest.mark.parametrize("claim", ["T1", "R1", "R2"])
def test_an_effect_of_a_point_is_found(claim):
    simulated = SIMULATED[claim]
    found = count(claim, "effect", simulated, "supported")
    assert found >= scipy_stats.binom.ppf(1e-4, simulated, 0.8)


def test_flatness_through_training_loss_alone_does_not_support_t4():
    assert count("T4", "through the loss", 40, "supported") <= scipy_stats.binom.ppf(
        1 - 1e-4, 40, 0.05
    )


def test_the_benchmark_prints_every_truth(tmp_path, capsys):
    rows = simulations.main(
        ["--simulations", "2", "--draws", "50", "--out", str(tmp_path / "a" / "b.json")]
    )
    assert len(rows) == len(simulations.TRUTHS)
    assert json.loads((tmp_path / "a" / "b.json").read_text()) == rows
    assert "supported" in capsys.readouterr().out
