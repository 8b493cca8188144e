"""What a person is told after a retrain."""

import pytest

from flows.reports import Summary

SHARE = {"accuracy": 0.9, "accuracy_low": 0.85, "accuracy_high": 0.94}
EVALUATED = {"num_test": 200, "confidence": 0.95, **SHARE}
EXPORTED = {"max_probability_difference": 2e-7, "top1_agreement": 1.0}


@pytest.mark.parametrize(
    ("int8", "told"),
    [
        (None, None),
        ({"chosen": True, "reason": "it is faster"}, "int8 answers: it is faster"),
        ({"chosen": False, "reason": "it is not faster"}, "int8 is not taken: it is not faster"),
    ],
)
def test_what_became_of_int8_is_told_where_it_was_asked_for(int8: dict[str, object] | None, told: str | None) -> None:
    models = dict.fromkeys(("class_prototypes", "linear_probe", "finetuned"), SHARE)
    export = {**EXPORTED, "int8": int8}
    reports = {"train_head": {"is_at_chance": False}, "evaluate": {**EVALUATED, **models}, "export_onnx": export}
    text = Summary(reports, stages=(), verdict=None, champion=None).text()
    assert "100% the same label" in text
    assert told in text if told else "int8" not in text


def test_a_probe_at_chance_is_told_with_what_chance_is() -> None:
    models = dict.fromkeys(("class_prototypes", "linear_probe", "finetuned"), SHARE)
    head = {"is_at_chance": True, "out_of_fold_accuracy": 0.35, "chance_accuracy": 0.34}
    reports = {"train_head": head, "evaluate": {**EVALUATED, **models}, "export_onnx": EXPORTED}
    text = " ".join(Summary(reports, stages=(), verdict=None, champion=None).text().split())
    assert "the probe is at chance, 35.0% of held-out images where always naming the largest class gives 34.0%" in text
