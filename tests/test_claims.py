"""Verdicts: each rule by a constructed case, and simulated runs of a known truth."""

import json
import math
from dataclasses import replace
from itertools import product

import numpy as np
import pandas as pd
import pytest
from scipy import stats as scipy_stats
from statsmodels.api import OLS

from benchmarks import claims as simulations
from paperlib import claims, experiments, stats
from paperlib.claims import verdicts
from paperlib.claims.contrasts import BELOW, Contrast, paired
from paperlib.claims.gates import Gate
from paperlib.claims.tradeoff_2020 import DOSE_AND_TARGET, NETWORKS, PERIODS, T2
from paperlib.networks import events_of
from paperlib.runs import RunRecord, Store
from tests.store.helpers import file

N = 10
WOBBLE = np.array([0.3, -0.3, 0.2, -0.2, 0.1, -0.1, 0.25, -0.25, 0.05, -0.05])  # its mean is 0
STABILITY = {"smallest 4": 99 + WOBBLE, "smallest 40": 97 - WOBBLE, "largest 40": 95.0, "_": 100.0}


def registered(figure: str, network: str, accuracy: dict, **columns: dict) -> pd.DataFrame:
    """Runs of a figure, ten seeds: columns are dicts of setting -> values; "_" of all others."""
    pairs = [(setting, seed) for setting in accuracy for seed in range(N)]
    frame = pd.DataFrame(pairs, columns=["setting", "seed"])
    names = [f"{figure}.{network}.{setting}.{seed}" for setting, seed in pairs]
    frame = frame.assign(figure=figure, network=network, label=frame.setting.str.upper(), run=names)
    frame = frame.assign(choosing=False, done=True, finite=True, device="cpu")
    for name, values in {"accuracy": accuracy, **columns}.items():
        parts = [np.broadcast_to(values.get(s, values.get("_", 0.0)), N) for s in accuracy]
        frame[name] = np.concatenate(parts).astype(float)
    return frame.assign(best_accuracy=frame.accuracy + 1)


def t1_runs(s4=80.0, s40=80.0, l40=80.0, none=80.0, stability=None) -> pd.DataFrame:
    accuracy = {"smallest 4": s4, "smallest 40": s40, "largest 40": l40, "none": none}
    return registered("figure-2", "VGG11", accuracy, mean_stability=STABILITY | (stability or {}))


def conv4_runs(large=80.0, small=80.0, none=80.0) -> pd.DataFrame:
    accuracy = {"largest 0.9": large, "smallest 0.9": small, "none": none}
    return registered("figure-R1", "conv4", accuracy)


def noise_runs(figure: str, **accuracy: object) -> pd.DataFrame:
    spans = [f"{kind} {span}" for kind in ("zeroing", "gaussian") for span in (0, 51, 1106)]
    names = spans if figure == "figure-5" else ["restored 2480"]
    settings = dict.fromkeys([*names, "none", "largest 40 weights"], 80.0)
    given = {name.replace("_", " "): value for name, value in accuracy.items()}
    return registered(figure, "VGG11", settings | given)


def t3_runs(zeroing: float, gaussian: float) -> pd.DataFrame:
    longest = {"zeroing_1106": zeroing + WOBBLE, "gaussian_1106": gaussian - WOBBLE}
    return noise_runs("figure-5", **longest)


def t5_runs(restored: float, weights: float) -> pd.DataFrame:
    accuracy = {"restored_2480": restored + WOBBLE, "largest_40_weights": weights - WOBBLE}
    return noise_runs("figure-D2", **accuracy)


def t4_runs(fall: float = 0.3, by_loss: float = 0.0, sign: float = 1.0) -> pd.DataFrame:
    """log Tr(H) and log Tr(C) fall by `fall` for L, apart from `by_loss` times its log loss."""
    loss = 1 + np.random.default_rng(0).normal(0, 0.5, N)
    logs = -fall - by_loss * loss + 0.2 * WOBBLE
    columns = {
        "curvature": {"largest 40": 300 * np.exp(logs), "_": 300.0},
        "noise": {"largest 40": 2000 * np.exp(sign * logs), "_": 2000.0},
        "train_loss": {"largest 40": 0.001 * np.exp(loss), "_": 0.001},
        "delta_w": {"largest 40": 0.08 + 0.01 * WOBBLE, "_": 0.05},
    }
    accuracy = dict.fromkeys((*DOSE_AND_TARGET, "none"), 80.0)
    return registered("figure-6", "VGG11", accuracy, mean_stability=STABILITY, **columns)


def judged(name: str, runs: pd.DataFrame, gates=(), **how: bool) -> verdicts.Claim:
    rule = type(claims.CLAIMS[name])()
    if isinstance(rule, T2):
        rule.draws = 500
    return rule.judge(runs, gates, **how)


def simulated(name: str, truth: str = "effect") -> pd.DataFrame:
    return simulations.simulate("R2" if name == "R3" else name, truth, np.random.default_rng(0))


def failing(name: str, figure: str, network: str) -> Gate:
    return Gate(name, network, figure, "S", False, 1.5, "too little")


def contrasts(claim: verdicts.Claim, kind: str = "co-primary") -> list[Contrast]:
    return [contrast for contrast in claim.contrasts if contrast.kind == kind]


def spread(sd: float, seed: int = 0) -> pd.Series:
    """Numbers of mean 0 and this standard deviation."""
    values = np.random.default_rng(seed).normal(0, 1, N)
    return pd.Series(sd * (values - values.mean()) / values.std(ddof=1))


def difference(mean: float, sd: float = 0.3, **how: object) -> Contrast:
    return paired("a - b", mean + spread(sd), **how)


def test_contrasts_are_paired_t_tests():
    s4, s40, l40, none = np.random.default_rng(0).normal(80, 1, (4, N))
    claim = judged("T1", t1_runs(s4, s40, l40, none).sample(frac=1, random_state=0))
    assert [c.name for c in contrasts(claim)] == ["LARGEST 40 - SMALLEST 4", "LARGEST 40 - NONE"]
    for contrast, other in zip(contrasts(claim), (s4, none), strict=True):
        differences = l40 - other
        result = scipy_stats.ttest_1samp(differences, 0)
        flips = scipy_stats.permutation_test(
            (differences,), np.mean, permutation_type="samples", n_resamples=np.inf
        )
        assert contrast.fitted.value == pytest.approx(differences.mean())
        assert contrast.fitted.interval() == pytest.approx(tuple(result.confidence_interval()))
        assert contrast.p == pytest.approx(result.pvalue)
        assert contrast.sign_flip == pytest.approx(flips.pvalue)
        assert (contrast.n, contrast.registered, contrast.dropped) == (N, N, 0)


def test_secondary_contrasts_are_corrected_together():
    runs = t1_runs(*np.random.default_rng(1).normal(80, 1, (4, N)))
    runs["best_accuracy"] += np.random.default_rng(2).normal(0, 0.3, len(runs))
    claim = judged("T1", runs)
    secondary = sorted(contrasts(claim, "secondary"), key=lambda contrast: contrast.p)
    assert sum(contrast.outcome == "best_accuracy" for contrast in secondary) == 2
    assert len(secondary) == 2 + 4 + 2  # best accuracy, the other pairs, two slopes
    p = np.array([contrast.p for contrast in secondary])
    expected = np.maximum.accumulate(np.minimum(1, p * np.arange(len(p), 0, -1)))
    assert [contrast.holm for contrast in secondary] == pytest.approx(expected)
    assert all(math.isnan(c.holm) for c in claim.contrasts if c.kind != "secondary")


# Half widths at n = 10 and an SD of 0.3: 0.174 at 90%, 0.215 at 95%, 0.255 at 97.5%.
@pytest.mark.parametrize(
    ("means", "how", "expected"),
    [
        ((0.22, 0.22), {}, "supported"),
        ((0.22, 0.21), {}, "negligible"),
        ((0.32, 0.0), {}, "negligible"),  # by the 90% interval
        ((0.40, 0.21), {}, "undecided"),
        ((0.34, 0.0), {}, "undecided"),
        ((-0.25, 0.0), {}, "negligible"),
        ((-0.26, 0.0), {}, "contradicted"),
        ((-0.26, 0.22), {}, "mixed"),
        ((-0.25, 0.40), {}, "undecided"),
        ((-0.22,), {}, "contradicted"),
        ((-0.21,), {}, "negligible"),
        ((-0.21,), {"outcome": "log_noise"}, "undecided"),
        ((-0.22,), {"region": BELOW}, "supported"),
        ((0.22,), {"region": BELOW}, "contradicted"),
        ((-0.28,), {"region": (-0.5, math.inf)}, "supported"),  # not worse by more than delta
        ((-0.33,), {"region": (-0.5, math.inf)}, "undecided"),
        ((-0.72,), {"region": (-0.5, math.inf)}, "contradicted"),
        *[((mean,), {"region": (-1, 1)}, "supported") for mean in (0, 0.82, -0.82)],  # equivalence
        *[((mean,), {"region": (-1, 1)}, "undecided") for mean in (0.83, 1, 1.21)],
        *[((mean,), {"region": (-1, 1)}, "contradicted") for mean in (1.22, -1.22)],
    ],
)
def test_the_first_verdict_that_applies(means, how, expected):
    assert verdicts.verdict([difference(mean, **how) for mean in means], 0.5) == expected


ROUNDED = [75.1 - 74.8, 75.4 - 75.1, 60.4 - 60.1, 0.3]  # all would be 0.3


@pytest.mark.parametrize("values", [[0.5] * 2, [-0.5] * 2, [0.0] * 2, ROUNDED])
def test_equal_differences_show_no_deviation(values):
    contrast = paired("a - b", pd.Series(values))
    assert verdicts.verdict([contrast], 0.5) == "undecided"
    assert np.isnan([contrast.p, contrast.fitted.error]).all()


def test_the_interval_that_decides_is_noted():
    """For equivalence that is 90%, and not the 95% that stands beside it."""
    differences = 0.2 + spread(0.3)
    low, high = scipy_stats.ttest_1samp(differences, 0).confidence_interval(0.90)
    contrast = paired("a - b", differences, region=(-1, 1))
    assert f"90% interval [{low:+.2f}, {high:+.2f}]" in contrast.note


def test_p_and_sign_flip_are_against_the_null():
    contrast, moved = difference(-0.3, region=(-0.5, math.inf)), (0.2 + spread(0.3)).to_numpy()
    assert contrast.p == pytest.approx(scipy_stats.ttest_1samp(moved, 0).pvalue)
    assert contrast.sign_flip == pytest.approx(stats.sign_flip(moved))
    assert "p against -0.5" in contrast.note


@pytest.mark.parametrize(("lost", "expected"), [(1, "supported"), (2, "undecided")])
def test_more_than_one_pair_in_ten_dropped_decides_nothing(lost, expected):
    runs = conv4_runs(large=82 + WOBBLE)
    runs.loc[(runs.setting == "largest 0.9") & (runs.seed < lost), "finite"] = False
    claim = judged("R1", runs)
    assert (claim.verdict, claim.n) == (expected, "30 of 30")
    assert {(c.n, c.dropped) for c in contrasts(claim)} == {(N - lost, lost)}
    assert contrasts(claim)[0].fitted.value == pytest.approx(2 + WOBBLE[lost:].mean())


def test_dropped_pairs_of_a_premise_count():
    runs = t5_runs(82, 83)
    assert judged("T5", runs).verdict != "undecided"
    lost = (runs.setting == "largest 40 weights") & (runs.seed == 0)
    lost |= (runs.setting == "none") & (runs.seed == 1)
    assert judged("T5", runs.assign(finite=~lost)).verdict == "undecided"


@pytest.mark.parametrize("sd", [0.6, 1.5])
def test_power_of_one_contrast(sd):
    power = verdicts.power([difference(0.3, sd)], draws=20_000)
    noncentral = scipy_stats.nct(N - 1, math.sqrt(N) / sd)
    assert power == pytest.approx(noncentral.sf(scipy_stats.t.ppf(0.975, N - 1)), abs=0.012)
    assert math.isnan(verdicts.power([paired("a - b", pd.Series([1.0, np.nan]))]))


def test_power_of_two_contrasts_counts_that_they_go_together():
    """The same differences twice have the power of one; independent ones its square."""
    one, other = spread(0.85), spread(0.85, seed=1)
    other = other - one * (one @ other) / (one @ one)
    pairs = [paired("a - b", v * 0.85 / v.std()) for v in (one, one, other)]
    single, same, apart = (verdicts.power(c, 20_000) for c in (pairs[:1], pairs[:2], pairs[1:]))
    assert same == pytest.approx(single, abs=0.012)
    assert apart == pytest.approx(single**2, abs=0.012)
    premise = replace(pairs[1], kind="premise")
    assert verdicts.power([premise, pairs[2]], 20_000) == pytest.approx(single**2, abs=0.012)


def test_the_effect_that_power_is_for():
    cases = [
        ("accuracy", (0.0, math.inf), 1.0),
        ("accuracy", BELOW, -1.0),
        ("log_noise", BELOW, -0.1),
        ("accuracy", (-1, 1), 0.0),
        ("accuracy", (-0.5, math.inf), 0.0),
    ]
    for outcome, region, effect in cases:
        assert difference(0.3, outcome=outcome, region=region).effect == effect


def test_power_of_equivalence():
    power = verdicts.power([difference(0.3, 0.85, region=(-1, 1))], draws=20_000)
    drawn = np.random.default_rng(1).normal(0, 0.85, (20_000, N))
    half = scipy_stats.t.ppf(0.95, N - 1) * drawn.std(1, ddof=1) / math.sqrt(N)
    assert power == pytest.approx((abs(drawn.mean(1)) + half < 1).mean(), abs=0.015)


def test_power_counts_adjusted_contrasts():
    how = {"outcome": "log_noise", "region": BELOW}
    plain = difference(0.0, 0.1, **how)
    adjusted = difference(0.0, 0.1, kind="adjusted", covariate=3 + spread(1, seed=1), **how)
    assert verdicts.power([plain]) > 0.6
    assert verdicts.power([plain, adjusted]) < 0.4


def test_pairs_are_those_of_seeds_that_both_have():
    """It is told how many of them are between two devices."""
    runs = conv4_runs(large=82 + WOBBLE)
    some = (runs.setting == "largest 0.9") & (runs.seed < 3)
    mixed = runs.assign(device=runs.device.mask(some, "cuda"))
    for n in (5, N):
        second = contrasts(judged("R1", mixed[(mixed.setting != "none") | (mixed.seed < n)]))[1]
        assert (second.n, second.registered) == (n, n)
        assert second.note == f"3 of {n} pairs are between two devices"
    assert {c.note for c in contrasts(judged("R1", runs))} == {""}
    alike = judged("R4", runs.assign(device=runs.device.mask(runs.setting == "none", "cuda")))
    assert contrasts(alike)[0].note.endswith("1; 10 of 10 pairs are between two devices")


@pytest.mark.parametrize("name", claims.CLAIMS)
def test_incomplete_claims_read_no_number(name):
    """Without the columns of numbers there is nothing to read; and nothing is shown."""
    rule = claims.CLAIMS[name]
    plans = [experiments.plan(figure, "small").assign(figure=figure) for figure in rule.reads]
    columns = ["figure", "network", "setting", "label", "seed", "choosing", "run"]
    runs = pd.concat(plans, ignore_index=True)[columns].assign(done=True, finite=True)
    mine = (runs.figure == rule.figures[0]) & (runs.network == rule.network)
    runs.loc[runs.run == runs.run[mine].iloc[-1], "done"] = False
    found = rule.judge(runs, [failing("G2", rule.figures[0], rule.network)])
    assert (found.verdict, found.done) == ("incomplete", found.registered - 1)
    assert (found.contrasts, found.gates, found.notes) == ((), (), ())
    assert math.isnan(found.power)
    assert rule.judge(runs[:0], ()).n == "0 of 0"


# As docs/evidence.md registers them; G5 is of a contrast.
GATES = {"T1": "G1 G2 G3 G4", "T2": "G2 G3 G4", "T3": "G1 share", "T4": "G1 G3 G4", "T5": "G1"}
GATES |= {"R1": "G1 G2", "R2": "G2", "R3": "", "R4": "G2"}


@pytest.mark.parametrize("name", claims.CLAIMS)
def test_a_gate_that_fails_voids_its_claims_only(name):
    runs, rule = simulated(name).assign(parameters=1.0), claims.CLAIMS[name]
    figure, network = rule.figures[0], rule.network
    plain = judged(name, runs, secondary=False)
    every = [failing(gate, figure, network) for gate in ("G1", "G2", "G3", "G4", "share")]
    inapplicable = [replace(gate, passed=None) for gate in every]
    assert judged(name, runs, inapplicable, secondary=False).verdict == plain.verdict
    for failed in every:
        gate = failed.gate
        claim = judged(name, runs, [failed], secondary=False)
        if gate in GATES[name].split():
            assert (claim.verdict, claim.contrasts) == ("not testable", ())
            assert claim.gates[0].number == 1.5
        else:
            assert claim.verdict == plain.verdict
        for place in (("figure-1", network), (figure, "ResNet9")):
            other = judged(name, runs, [failing(gate, *place)], secondary=False)
            assert other.verdict == plain.verdict
    lost = runs[~runs.setting.str.startswith(("largest", "zeroing 1106", "none"))]
    claim = judged(name, lost)
    assert (claim.verdict, claim.contrasts) == ("not testable", ())


L40 = {"s40": 81.0, "l40": 82 + WOBBLE}
# Whatever the settings are called: here S 13% is the least and L 13% the most stable.
TURNED = {"smallest 40": 94 - WOBBLE, "largest 40": 99.5 + WOBBLE, "smallest 4": 97.0}
ONE_AT_CHANCE = np.where(np.arange(N), 82 + WOBBLE, 10)


@pytest.mark.parametrize(
    ("name", "runs", "verdict"),
    [
        ("T1", t1_runs(**L40), "supported"),
        ("T1", t1_runs(**L40, none=81.9), "undecided"),
        ("T1", t1_runs(**L40, none=84.0), "mixed"),
        ("T1", t1_runs(**L40, none=84.0, s4=84.0), "contradicted"),
        ("T1", t1_runs(l40=80 + 0.1 * WOBBLE), "negligible"),
        ("T1", t1_runs(s40=82 + WOBBLE, l40=80.5, stability=TURNED), "supported"),
        ("T1", t1_runs(s40=80 - WOBBLE, l40=82 + WOBBLE, stability=TURNED), "contradicted"),
        ("T3", t3_runs(81, 81), "supported"),
        ("T3", t3_runs(81, 80), "undecided"),
        ("T3", t3_runs(81, 79), "mixed"),
        ("T3", t3_runs(80, 80), "negligible"),
        ("T4", t4_runs(), "supported"),
        ("T4", t4_runs(fall=-0.3), "contradicted"),
        ("T4", t4_runs(sign=-1), "mixed"),
        ("T4", t4_runs(fall=0), "undecided"),  # never negligible
        ("T4", t4_runs(fall=0, by_loss=1), "not apart from training loss"),
        ("T5", t5_runs(81, 81), "supported"),
        ("T5", t5_runs(82, 81), "supported"),
        ("T5", t5_runs(81, 80), "no premise"),
        ("T5", t5_runs(81, 79), "no premise"),
        ("T5", t5_runs(80, 81), "contradicted"),  # worse than Prune_L by more than delta
        ("T5", t5_runs(81, 83), "mixed"),
        ("T5", t5_runs(80.5, 80.9), "undecided"),
        ("R1", conv4_runs(81 + WOBBLE), "supported"),
        ("R1", conv4_runs(80.8 + WOBBLE, none=80.75), "negligible"),
        ("R1", conv4_runs(81 + WOBBLE, none=82), "mixed"),
        ("R1", conv4_runs(ONE_AT_CHANCE), "undecided"),
        *[("R4", conv4_runs(small=mean + WOBBLE), "supported") for mean in (80.0, 80.8)],
        *[("R4", conv4_runs(small=mean + WOBBLE), "undecided") for mean in (79.0, 81.0)],
        *[("R4", conv4_runs(small=mean + WOBBLE), "contradicted") for mean in (78.7, 81.3)],
    ],
)
def test_verdicts_of_each_claim(name, runs, verdict):
    assert judged(name, runs).verdict == verdict


@pytest.mark.parametrize(
    ("stability", "names"),
    [
        (TURNED, ["SMALLEST 40 - LARGEST 40", "SMALLEST 40 - NONE"]),
        (  # the mean over seeds counts
            {"smallest 4": np.where(np.arange(N), 99.0, 90.0)},
            ["LARGEST 40 - SMALLEST 4", "LARGEST 40 - NONE"],
        ),
    ],
)
def test_t1_goes_by_stability_as_measured(stability, names):
    claim = judged("T1", t1_runs(s40=82 + WOBBLE, l40=80.5, stability=stability))
    assert [c.name for c in contrasts(claim)] == names


@pytest.mark.parametrize(
    "stability",
    [
        {s: 97 + WOBBLE * sign for s, sign in zip(STABILITY, (1, -1, 2), strict=False)},
        # By the 95% interval:
        {"largest 40": 97.0, "smallest 40": 97.1, "smallest 4": 97.19 + spread(0.3)},
    ],
)
def test_t1_needs_stabilities_that_differ(stability):
    claim = judged("T1", t1_runs(l40=82 + WOBBLE, stability=stability))
    assert (claim.verdict, claim.contrasts) == ("not testable", ())
    assert [(gate.gate, gate.passed) for gate in claim.gates] == [("G5", False)]


def test_pairs_of_like_stability_are_noted():
    apart = {"smallest 40": 99 - WOBBLE, "largest 40": 94 + 0.5 * WOBBLE}
    claim = judged("T1", t1_runs(l40=82 + WOBBLE, stability=apart))
    (noted,) = [c.name for c in contrasts(claim, "secondary") if "G5" in c.note]
    assert noted in ("SMALLEST 40 - SMALLEST 4", "SMALLEST 4 - SMALLEST 40")


def test_t1_describes_accuracy_by_stability():
    """Slopes are there also if the mixed model has no fit, and leave out runs that were lost."""
    runs = t1_runs(*np.random.default_rng(0).normal(80, 1, (4, N)))
    lost = (runs.setting == "largest 40") & (runs.seed == 0)
    alike = t1_runs(s4=80.0, s40=81.0, l40=82 + WOBBLE)
    for frame, counts in ((runs.assign(finite=~lost), (29, 1)), (t1_runs(), (30, 0))):
        secondary = contrasts(judged("T1", frame), "secondary")
        slopes = [c for c in secondary if "on mean stability" in c.name]
        assert [(c.n, c.dropped) for c in slopes] == [counts] * 2
    (tau,) = contrasts(judged("T1", alike), "described")
    assert (tau.fitted.value, tau.n) == (-1, 3)  # the less stable, the better


def test_t2_is_supported_if_both_parts_are():
    runs = simulated("T2")
    claim = judged("T2", runs)
    assert claim.verdict == "supported"
    assert [(c.n, c.dropped) for c in contrasts(claim)] == [(21, 0), (40, 0)]
    assert 0.8 < claim.power <= 1
    assert [c.outcome for c in contrasts(claim, "secondary")] == ["best_accuracy"] * 2
    reverse = runs.assign(accuracy=160 - runs.accuracy)
    assert judged("T2", reverse, secondary=False).verdict == "contradicted"
    half = runs.assign(accuracy=runs.accuracy.where(runs.figure == "figure-3", reverse.accuracy))
    assert judged("T2", half, secondary=False).verdict == "mixed"


def test_t2_orders_the_targets_of_each_rate_and_drops_a_seed():
    """The statistic from scipy's tau of the targets' means, rate by rate."""
    runs = simulated("T2", "no effect")
    mine = runs[runs.figure == "figure-3"]
    means = mine.groupby("setting")[["mean_stability", "accuracy"]].mean()
    taus = [
        scipy_stats.kendalltau(*means[means.index.str.endswith(f" {period}")].T.to_numpy())
        for period in PERIODS
    ]
    permuted = contrasts(judged("T2", runs))[0]
    assert permuted.fitted.value == pytest.approx(sum(tau.statistic for tau in taus))
    lost = (runs.figure == "figure-3") & (runs.setting == "random 60") & (runs.seed == 1)
    claim = judged("T2", runs.assign(finite=~lost))
    assert (contrasts(claim)[0].n, contrasts(claim)[0].dropped) == (20, 1)
    beside = (runs.figure == "figure-3") & runs.setting.str.endswith(" 60") & (runs.seed == 1)
    other = runs.assign(finite=~lost, accuracy=runs.accuracy.where(~beside, 0.0))
    assert judged("T2", other).power == claim.power  # the seed's other targets are left out, too


@pytest.mark.parametrize(
    ("tau", "p", "supported", "contradicted"),
    [(-5, 0.049, True, False), (5, 0.049, False, True), (5, 0.051, False, False)],
)
def test_a_permutation_test_decides_at_half_of_5_percent_a_side(tau, p, supported, contradicted):
    """At each side, also where there are two co-primary contrasts."""
    fitted = stats.Fitted(tau, np.nan, 0)
    contrast = Contrast("tau", "co-primary", "accuracy", fitted, 21, 21, BELOW, p)
    assert (contrast.supported, contrast.contradicted(0.975)) == (supported, contradicted)


def test_t2_networks_are_eight_paired_differences():
    """Figure 4's and C3's have a fixed direction, the others that of their mean stabilities."""
    runs = simulated("T2")
    turned = runs.assign(mean_stability=200 - runs.mean_stability)
    for frame in (runs, turned):
        each = contrasts(judged("T2", frame), "described")
        for contrast, (figure, network, settings) in zip(each, NETWORKS, strict=True):
            mine = frame[(frame.figure == figure) & (frame.network == network)]
            wide = mine.pivot(index="seed", columns="setting", values="accuracy")
            stable = mine.groupby("setting").mean_stability.mean()[list(settings)]
            ranked = stable.sort_values().index if len(settings) == 3 else settings
            result = scipy_stats.ttest_rel(wide[ranked[0]], wide[ranked[-1]])
            assert contrast.fitted.interval() == pytest.approx(tuple(result.confidence_interval()))
            assert contrast.n == 5


@pytest.mark.parametrize(("kept", "verdict"), [(3, "supported"), (2, "not testable")])
def test_t2_leaves_out_networks_before_their_accuracies_are_read(kept, verdict):
    """Runs without accuracies stand for those that must not be read. Three networks are needed."""
    runs, gates = simulated("T2"), []
    for figure, network, _ in NETWORKS[kept:]:
        of = (runs.figure == figure) & (runs.network == network)
        runs.loc[of, ["accuracy", "best_accuracy"]] = np.inf
        gates.append(failing("G3", figure, network))
    claim = judged("T2", runs, gates)
    assert claim.verdict == verdict
    assert len(claim.notes) == 8 - kept
    assert len(contrasts(claim, "described")) == (0 if verdict == "not testable" else kept)


def test_t2_is_one_sided_at_half_of_5_percent(monkeypatch):
    monkeypatch.setattr(stats, "permuted_tau", lambda *_: (-3.0, 0.03, 0.98))
    permuted = contrasts(judged("T2", simulated("T2"), secondary=False))[0]
    assert permuted.p == 0.06
    assert not permuted.supported


def test_t2_summary_of_the_networks():
    runs = simulated("T2", "networks differ")
    claim = judged("T2", runs, secondary=False)
    each, together = contrasts(judged("T2", runs), "described"), contrasts(claim)[1]
    effects, errors = zip(*(c.fitted[:2] for c in each), strict=True)
    assert together.fitted == stats.random_effects(effects, np.square(errors))[0]
    same = (runs.figure == "figure-C3") | (runs.figure == "table-C1")
    claim = judged("T2", runs.assign(accuracy=runs.accuracy.mask(same, 80.0)), secondary=False)
    together = contrasts(claim)[1]
    assert (together.name, together.n, together.registered) == ("6 networks together", 30, 40)
    assert np.isfinite(together.fitted.error)


@pytest.mark.filterwarnings("ignore:The design matrix is rank-deficient")
def test_t2_power_draws_from_the_deviation_observed(monkeypatch):
    """Targets are at 0.5, 0 and -0.5 by their stability at a rate, seeds apart."""
    runs, seen, real = simulated("T2", "no effect"), [], stats.permuted_tau
    of_target = {"smallest": 97.0, "random": 99.0, "largest": 95.0}
    runs["mean_stability"] = runs.setting.str.split().str[0].map(of_target).fillna(100.0)

    def tau(stability, accuracy, draws, *_):
        seen.append((stability, accuracy, draws))
        return real(stability, accuracy, draws) if draws != 499 else (0.0, 0.03, 0.98)

    monkeypatch.setattr(stats, "permuted_tau", tau)
    assert judged("T2", runs).power == 0  # p = 0.03 of one side does not support the claim
    drawn = np.array([accuracy for _, accuracy, draws in seen if draws == 499])
    stability = seen[-1][0]
    mine = runs[runs.figure == "figure-3"]
    mine = mine.assign(cell=mine.setting.str.split().str[1] + "." + mine.seed.astype(str))
    fit = OLS.from_formula("accuracy ~ setting + cell", mine).fit()
    rank = stability.mean(1).argsort(1).argsort(1)
    assert drawn.mean((0, 2)) == pytest.approx(0.5 - rank / 2, abs=0.15)
    residuals = drawn - (0.5 - rank / 2)[:, None]
    assert residuals.std() == pytest.approx(math.sqrt(fit.scale), rel=0.02)
    monkeypatch.setattr(stats, "permuted_tau", lambda *_: (-7.0, 0.001, 1.0))
    claim = judged("T2", runs)
    together = contrasts(claim)[1].fitted
    assert claim.power == pytest.approx(stats.power_of_t(1.0, together))


def test_t3_trend_over_spans():
    """The least-squares slope on log10(1 + span), of each seed that has all three."""
    rng = np.random.default_rng(0)
    values = {f"zeroing_{span}": rng.normal(80, 1, N) for span in (0, 51, 1106)}
    runs = noise_runs("figure-5", **values)
    claim = judged("T3", runs[(runs.setting != "zeroing 51") | (runs.seed < 5)])
    spans = np.log10([1, 52, 1107])
    slopes = [scipy_stats.linregress(spans, of).slope for of in np.array([*values.values()]).T[:5]]
    trend = next(c for c in contrasts(claim, "secondary") if c.name.startswith("zeroing"))
    assert trend.fitted.value == pytest.approx(np.mean(slopes))
    assert trend.n == trend.registered == 5
    assert trend.p == pytest.approx(scipy_stats.ttest_1samp(slopes, 0).pvalue)


def test_t5_has_the_premise_that_pruning_is_better():
    (premise,) = contrasts(judged("T5", t5_runs(81, 83)), "premise")
    assert premise.name == "LARGEST 40 WEIGHTS - NONE"
    assert premise.fitted.value == pytest.approx(3)


def test_names_of_secondary_contrasts():
    t3 = judged("T3", t3_runs(81, 81))
    names = [c.name for c in contrasts(t3, "secondary") if c.null == -0.5]
    assert names == [f"{n} 1106 - LARGEST 40 WEIGHTS" for n in ("ZEROING", "GAUSSIAN")]
    t4 = judged("T4", t4_runs())
    (delta_w,) = contrasts(t4, "secondary")
    assert delta_w.name == "LARGEST 40 - SMALLEST 4"
    assert delta_w.fitted.value == pytest.approx(0.03)
    described = [c.name for c in contrasts(t4, "described")]
    assert described == [f"{s} - NONE" for s in ("LARGEST 40", "SMALLEST 4") for _ in range(2)]


def test_t4_adjusts_for_training_loss():
    runs = t4_runs(by_loss=0.4)
    claim = judged("T4", runs)
    logs = runs.assign(curvature=np.log(runs.curvature), train_loss=np.log(runs.train_loss))
    wide = logs.pivot(index="seed", columns="setting", values=["curvature", "train_loss"])
    y, x = (wide[c]["largest 40"] - wide[c]["smallest 4"] for c in ("curvature", "train_loss"))
    line = scipy_stats.linregress(x, y)
    adjusted = contrasts(claim, "adjusted")[0]
    assert adjusted.fitted == pytest.approx((line.intercept, line.intercept_stderr, N - 2))
    assert contrasts(claim)[0].fitted.value == pytest.approx(y.mean())


def test_numbers_without_a_logarithm_count_as_dropped():
    runs = t4_runs()
    runs.loc[(runs.setting == "largest 40") & (runs.seed < 2), "train_loss"] = 0.0
    runs.loc[(runs.setting == "largest 40") & (runs.seed == 0), "curvature"] = -1.0
    claim = judged("T4", runs)
    assert [c.dropped for c in contrasts(claim)] == [1, 0]
    assert [c.dropped for c in contrasts(claim, "adjusted")] == [2, 2]
    assert claim.verdict == "undecided"


def test_r1_waits_with_secondary_contrasts_only():
    runs = simulated("R1")
    claim = judged("R1", runs)
    by_fraction = [c for c in contrasts(claim, "secondary") if c.outcome == "accuracy"]
    pairs = [(f"Prune_L {p}%", f"Prune_S {p}%") for p in (50, 70, 80, 90, 95, 98)]
    expected = [f"{large} - {other}" for large, small in pairs for other in (small, "No Pruning")]
    assert [(c.name, c.n) for c in by_fraction] == [(name, 3) for name in expected]
    runs.loc[(runs.figure == "figure-R3") & (runs.setting == "random 0.5"), "done"] = False
    waiting = judged("R1", runs)
    assert (waiting.verdict, waiting.power) == (claim.verdict, claim.power)
    assert contrasts(waiting, "secondary") == []
    assert len(waiting.notes) == 1


def dropout_runs(choosing: dict) -> pd.DataFrame:
    """Prune_L at 80 in figure R-1; R-4's dropouts, with these accuracies on seeds 10 to 14."""
    r1 = registered("figure-R1", "conv4", {"largest 0.9": 80 + WOBBLE, "none": 79.0})
    r4 = registered("figure-R4", "conv4", COMPARED)
    chosen = registered("figure-R4", "conv4", choosing).query("seed < 5")
    chosen = chosen.assign(seed=chosen.seed + 10, choosing=True, run=chosen.run + ".choosing")
    return pd.concat([r1, r4, chosen], ignore_index=True)


A, B, C = "dropout 0.25/0", "dropout 0/0.5", "dropout 0.25/0.5"
COMPARED = {A: 77.0, B: 78.0, C: 79.0}
ONE_HIGH = np.array([90.0, *[60.0] * 9])
LESS = np.array([71.27, 70.54, 70.08, 70.03, 71.63, *[0.0] * 5])  # the same mean but for rounding
MORE = np.array([71.63, 70.03, 70.08, 70.54, 71.27, *[0.0] * 5])


@pytest.mark.parametrize(
    ("choosing", "best"),
    [
        *[((70, 71, 72), C), ((70, 72, 71), B), ((72, 71, 70), A)],
        *[((70, 71, 71), B), ((70, 70, 70), A)],  # on a tie the lower rates
        *[((ONE_HIGH, 70, 65), B), ((ONE_HIGH, 65, 64), A), ((LESS, MORE, 65), A)],  # by the mean
    ],
)
def test_r2_chooses_dropout_on_seeds_of_its_own(choosing, best):
    """Seeds 0 to 9, on which C is best, do not choose."""
    runs = dropout_runs(dict(zip((A, B, C), choosing, strict=True)))
    claim = judged("R2", runs)
    (contrast,) = contrasts(claim)
    assert contrast.name == f"LARGEST 0.9 - {best.upper()}"
    assert contrast.fitted.value == pytest.approx(80 - COMPARED[best])
    assert (contrast.n, claim.verdict) == (N, "supported")
    assert [c.outcome for c in contrasts(claim, "secondary")] == ["best_accuracy"]
    sizes = {"largest 0.9": 189_175, "none": 1_250_858}
    r3 = judged("R3", runs.assign(parameters=runs.setting.map(sizes)))
    assert (r3.name, r3.verdict) == ("R3", claim.verdict)
    assert claims.to_dict(r3)["contrasts"] == claims.to_dict(claim)["contrasts"]
    assert any("84.9" in note for note in r3.notes)
    lost = runs.assign(finite=~((runs.setting == best) & runs.choosing))
    (contrast,) = contrasts(judged("R2", lost))
    assert contrast.name != f"LARGEST 0.9 - {best.upper()}"


@pytest.mark.parametrize("lost", [A, C])
def test_r2_needs_choosing_seeds_of_every_dropout(lost):
    runs = dropout_runs({A: 70, B: 71, C: 72})
    runs = runs[~(runs.choosing & (runs.setting == lost))]
    assert judged("R2", runs).verdict == "not testable"


def test_a_run_of_two_figures_counts_once():
    runs = dropout_runs({A: 70, B: 71, C: 72})
    again = runs[(runs.setting == C) & ~runs.choosing].assign(figure="figure-R1")
    claim = judged("R2", pd.concat([runs, again], ignore_index=True))
    assert claim.registered == len(runs)
    assert [(c.n, c.registered) for c in claim.contrasts] == [(N, N)] * 2


def test_one_row_a_contrast_and_json():
    gate = replace(failing("G1", "figure-2", "VGG11"), passed=True)
    t1 = judged("T1", t1_runs(l40=82 + WOBBLE), [gate])
    t3 = judged("T3", noise_runs("figure-5").assign(done=False))
    frame = claims.to_frame([t1, t3])
    assert len(frame) == len(t1.contrasts) + 1
    first, row, last = t1.contrasts[0], frame.iloc[0], frame.iloc[-1]
    numbers = (first.fitted.value, *first.fitted.interval())
    assert (row.contrast, row.estimate, row.low, row.high) == (first.name, *numbers)
    assert (last.claim, last.verdict, last.runs) == ("T3", "incomplete", "0 of 80")
    assert last.drop(["claim", "verdict", "runs"]).isna().all()
    failed = [failing(f"G{i}", "figure-5", "VGG11") for i in range(5)]
    note = claims.to_frame([replace(t3, gates=tuple(failed))]).note[0]
    assert [f"G{i}" in note for i in range(5)] == [True] * 2 + [False] * 3
    assert note.endswith("and 3 more")
    content = json.loads(json.dumps(claims.to_dict(t1), allow_nan=False))
    assert content["gates"][0] == vars(gate)
    assert (content["verdict"], content["contrasts"][0]["estimate"]) == (t1.verdict, row.estimate)
    assert claims.to_dict(t3)["power"] is None


def record(config, accuracy: float) -> RunRecord:
    """A run that learns everything, of constant test accuracy; its training loss rises slowly."""
    epochs = pd.DataFrame({"epoch": range(config.epochs), "trained": True, "learning_rate": 0.001})
    epochs = epochs.assign(train_loss=0.001 + 1e-6 * epochs.epoch, train_accuracy=100.0)
    epochs = epochs.assign(test_loss=1.0, seconds=0.1)
    removed = epochs.epoch.isin(list(events_of(config.pruning))).astype(int)
    epochs = epochs.assign(pre=accuracy, post=accuracy, removed=removed)
    arrays = {}
    if config.flatness is not None:
        epsilons = np.array(config.flatness.epsilons)
        arrays = {"eigenvalues": np.array([2.0, 1.0], "float32"), "noise": np.float32(7)}
        arrays |= {"epsilons": epsilons, "losses": np.ones((2, len(epsilons)))}
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
    assert (found["R1"].n, found["R1"].contrasts[0].n) == ("10 of 10", 2)
    assert found["R1"].contrasts[0].fitted.value == pytest.approx(3, abs=0.1)
    for change in ({"seeds": 1}, {"networks": ("VGG11",)}):  # those registered count
        assert claims.judge(experiments.Scale("demo", **change), store, ["R1"])[0].n == "10 of 10"
    assert any("90.0%" in note for note in found["R3"].notes)
    assert found["T4"].done == found["T4"].registered == 12
    assert {gate.gate for gate in found["T4"].gates} >= {"G1", "G3", "G4"}


def test_runs_that_are_missing_damaged_or_failed(store):
    plan = experiments.plan("figure-R1", "demo").set_index(["setting", "seed"])
    large, small = (plan.loc[(f"{target} 0.9", 0)] for target in ("largest", "smallest"))

    def r1() -> verdicts.Claim:
        return claims.judge("demo", store=store, names=["R1"])[0]

    file(store, small.run).write_bytes(b"damaged")
    shown = claims.to_dict(r1())  # no gate, contrast, interval, p or power before all are there
    assert (shown["verdict"], shown["done"], shown["registered"]) == ("incomplete", 9, 10)
    assert not any(shown[name] for name in ("contrasts", "gates", "notes", "effect", "power"))
    store.write(record(small.config, 80.0))
    file(store, large.run).unlink()
    store.fail(large.config, "out of memory")
    assert r1().n == "9 of 10"
    for loss, value in product(("loss", "test loss"), ("nan", "inf")):
        store.fail(large.config, f"the {loss} of {large.config.title} is {value} at epoch 3")
        assert (r1().verdict, r1().n, r1().contrasts[0].dropped) == ("undecided", "10 of 10", 1)


def test_flatness_of_t4(store):
    runs, _ = claims.load("demo", store, ["figure-6"])
    config = runs.config.iloc[0].flatness
    expected = {"curvature": 3.0, "noise": 7.0, "train_loss": 0.001 + 1e-6 * config.epoch}
    assert (runs[list(expected)] == expected).all(axis=None)
    assert runs.delta_w.to_numpy() == pytest.approx(config.reach + config.step)  # never reached
    file(store, runs.run[0]).unlink()
    assert claims.judge("demo", store=store, names=["T4"])[0].n == "11 of 12"


def test_claims_of_figures_that_show_the_same_runs():
    assert claims.carried("figure-E6") == ["T1"]
    assert claims.carried("figure-R2") == ["R2", "R3"]


# Simulated runs of a known truth. Counts may leave their bounds once in 10,000 data sets.


def count(claim: str, truth: str, *names: str) -> tuple[int, int]:
    simulated = {"T2": 30, "T4": 50}.get(claim, 80)
    found = simulations.verdicts(claim, truth, simulated, draws=300)
    return sum(new in names for new, _ in found), simulated


@pytest.mark.parametrize(
    ("claim", "truth"),
    [*((claim, "no effect") for claim in simulations.CLAIMS), ("T4", "through the loss")],
)
def test_false_verdicts_are_rare(claim, truth):
    """At most 5%; R4, which lies on the border of its two verdicts, 5% and 2.5%."""
    false, simulated = count(claim, truth, "supported", "contradicted", "mixed")
    rate = 0.075 if claim == "R4" else 0.05
    assert false <= scipy_stats.binom.ppf(1 - 1e-4, simulated, rate)


@pytest.mark.parametrize("claim", ["T1", "R1", "R2"])
def test_an_effect_of_a_point_is_found(claim):
    found, simulated = count(claim, "effect", "supported")
    assert found >= scipy_stats.binom.ppf(1e-4, simulated, 0.8)


def test_the_benchmark_judges_every_truth(tmp_path):
    out = tmp_path / "a" / "b.json"
    rows = simulations.main(["--simulations", "1", "--draws", "50", "--out", str(out)])
    assert len(rows) == len(simulations.TRUTHS)
    assert json.loads(out.read_text()) == rows
