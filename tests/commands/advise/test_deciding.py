"""The rules, on evidence of which every number is known."""

from __future__ import annotations

from dataclasses import replace

from embedpipe.commands.advise._decision import decide, first_unfrozen
from embedpipe.commands.advise._measurement import Counted, Difference, Evidence, HeadEvidence


def head(*layers: str, accuracy: float, half: float = 0.01) -> HeadEvidence:
    """A head whose difference to a last layer of 0.9 has an interval of +-half."""
    gain = accuracy - 0.9
    return HeadEvidence(layers, 64, 0.01, accuracy, Difference(gain, (gain - half, gain + half)), 1.0)


PLAIN = Evidence(
    n_train=200,
    n_val=100,
    n_classes=5,
    n_judged=300,
    chance=0.2,
    layers=(head("stem", accuracy=0.3), head("blocks.1", accuracy=0.8), head("penultimate", accuracy=0.9)),
    several=head("blocks.1", "penultimate", accuracy=0.9),
    curve={60: 0.7, 120: 0.89, 240: 0.9},
    slope=Difference(0.01, (-0.01, 0.03)),
    separable=1.0,
    knn=0.7,
    wrong_labels=Counted(250, 0.0, (0.0, 0.01)),
    leaked=Counted(200, 0.0, (0.0, 0.01)),
)


def actions(evidence: Evidence) -> list[str]:
    return [choice.action for choice in decide(evidence)]


def test_a_linear_head_where_nothing_adds_a_point() -> None:
    found = decide(PLAIN)
    assert found[0].action == "linear-head"
    assert found[0].gain == 0.0
    assert sorted(actions(PLAIN)[1:]) == ["earlier-layer", "finetune", "finetune-all", "more-data", "several-layers"]


def test_nothing_is_promised_where_no_head_beats_chance() -> None:
    """On noise: fine-tuning may help, and nothing shows it."""
    noise = [head(*one.layers, accuracy=0.33) for one in PLAIN.layers]
    lost = replace(PLAIN, n_classes=3, chance=0.34, layers=tuple(noise), several=noise[-1])
    assert actions(replace(lost, chance=0.2))[0] == "finetune-all"
    first, *rest = decide(lost)
    assert first.action == "linear-head"
    assert "no evidence that the labels can be learned" in first.reason
    assert all(choice.ci95 and choice.ci95[0] <= 0 for choice in rest if choice.action.startswith("finetune"))


def test_layers_are_taken_for_a_gain_beyond_its_interval_only() -> None:
    better = replace(PLAIN, several=head("blocks.1", "penultimate", accuracy=0.96))
    assert actions(better)[0] == "several-layers"
    assert (
        actions(replace(better, several=head("blocks.1", "penultimate", accuracy=0.96, half=0.06)))[0] == "linear-head"
    )


def test_the_cheaper_of_two_that_gain_the_same() -> None:
    layers = (PLAIN.layers[0], head("blocks.1", accuracy=0.96), PLAIN.last)
    both = replace(PLAIN, layers=layers, several=head("blocks.1", "penultimate", accuracy=0.965))
    assert decide(both)[0].layers == ("blocks.1",)
    assert actions(replace(both, several=head("blocks.1", "penultimate", accuracy=0.99)))[0] == "several-layers"


def test_fine_tuning_asks_for_images_and_for_errors_to_remove() -> None:
    large = replace(PLAIN, n_train=1000)
    assert decide(large)[0].action == "finetune"
    assert decide(large)[0].layers == ("blocks.1",) == (first_unfrozen(large),)
    low, high = decide(large)[0].ci95 or (0, 0)
    assert 0.01 < low < decide(large)[0].gain < high  # type: ignore[operator]
    nearly = replace(large, several=head("blocks.1", "penultimate", accuracy=0.98))
    assert actions(nearly)[0] == "several-layers"


def test_nearly_as_good_is_told_above_chance() -> None:
    layers = (head("stem", accuracy=0.75), *PLAIN.layers[1:])
    assert first_unfrozen(replace(PLAIN, layers=layers, chance=0.1)) == "stem"
    assert first_unfrozen(replace(PLAIN, layers=layers, chance=0.6)) == "blocks.1"


def test_all_is_fine_tuned_where_the_best_heads_err_much() -> None:
    poor = [replace(one, accuracy=one.accuracy - 0.3) for one in (*PLAIN.layers, PLAIN.several)]
    hard = replace(PLAIN, n_train=1000, layers=tuple(poor[:-1]), several=poor[-1])
    assert actions(hard)[0] == "finetune-all"


def test_more_data_where_only_they_help() -> None:
    steep = Difference(0.08, (0.05, 0.11))
    assert actions(replace(PLAIN, slope=steep))[0] == "more-data"
    assert actions(replace(PLAIN, slope=steep, n_train=1000))[0] == "finetune"


def test_leaks_and_wrong_labels_come_first_and_the_rest_is_reported_too() -> None:
    wrong, leaked = Counted(250, 0.2, (0.15, 0.25), ("a",) * 50), Counted(200, 0.1, (0.06, 0.15), ("b",) * 20)
    both = actions(replace(PLAIN, wrong_labels=wrong, leaked=leaked))
    assert both[:3] == ["fix-leaks", "fix-labels", "linear-head"]


def test_heads_that_agree_on_little_or_still_learn_say_nothing_of_labels() -> None:
    wrong = Counted(250, 0.2, (0.15, 0.25), ("a",) * 50)
    assert actions(replace(PLAIN, wrong_labels=wrong))[0] == "fix-labels"
    assert "fix-labels" not in actions(replace(PLAIN, wrong_labels=replace(wrong, n=140)))
    assert "fix-labels" not in actions(replace(PLAIN, wrong_labels=wrong, slope=Difference(0.1, (0.05, 0.15))))
