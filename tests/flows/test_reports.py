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
    reports = {"evaluate": {**EVALUATED, **models}, "export_onnx": {**EXPORTED, "int8": int8}}
    text = Summary(reports, stages=(), verdict=None, champion=None).text()
    assert "100% the same label" in text
    assert told in text if told else "int8" not in text
