"""Unmet expectations in words: what happened and where, what was expected, what to do."""

from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from tasks.data.expectations import SHIFTS, Expectation, Finding

if TYPE_CHECKING:
    import pandas as pd

MAX_NAMED = 20


def listed(items: Sequence[str]) -> str:
    """The first 20 names in one line, and how many more there are."""
    more = f" and {len(items) - MAX_NAMED:,} more" if len(items) > MAX_NAMED else ""
    return ", ".join(_printable(item) for item in items[:MAX_NAMED]) + more


def _printable(text: str) -> str:
    """A name with its line breaks and the like written as escapes."""
    return "".join(each if each.isprintable() else each.encode("unicode_escape").decode() for each in text)


def quarantine_reason(expected: Expectation, row: Mapping[Hashable, Any]) -> str:
    """Why one image is left out.

    Args:
        expected: What it does not meet.
        row: Its row of the image table.
    """
    size = f"{row['width']}x{row['height']} px"
    reasons = {
        "decodes": f"does not decode: {row['error']}",
        "large enough": f"too small: {size}, validate_data.min_side_px is {expected.min_value}",
        "no strip": f"too long and narrow: {size}, validate_data.max_aspect_ratio is {expected.max_value:g}"
        if expected.max_value is not None
        else "",
        "one label": f"the same bytes under another label: {row['twin']}",
        "in one split": f"the same bytes are in another split, which keeps them: {row['twin']}",
        "no copy": f"a copy of {row['twin']}",
    }
    return reasons[expected.name]


def image_remark(expected: Expectation, row: Mapping[Hashable, Any]) -> str:
    """What is unusual about one image that stays.

    Args:
        expected: What it does not meet.
        row: Its row of the image table.
    """
    if expected.column.endswith("_z"):
        name = expected.column.removesuffix("_z")
        return f"{name} {row[name]:.1f}, {row[expected.column]:+.1f} deviations from the median"
    remarks = {
        "usual mode": f"mode {row['mode']}",
        "usual format": f"format {row['format']}",
        "one label a group": f"looks like {row['group_twin']}",
    }
    return remarks[expected.name]


def images_complaint(expected: Expectation, remarks: Mapping[str, str], *, where: str) -> str:
    """One paragraph on images that stay although they are unusual.

    Args:
        expected: What they do not meet.
        remarks: What is unusual about each, by path.
        where: Name of the folder of images, for the message.
    """
    names = listed([f"{path} ({remark})" for path, remark in remarks.items()])
    told = {
        "usual mode": "of a colour mode that few others have",
        "usual format": "of a format that few others have",
        "one label a group": "all but the same as an image under another label; one label may be wrong",
    }.get(expected.name, f"of unusual {expected.column.removesuffix('_z')}")
    return f"{where}: {_plural(len(remarks), 'image is', 'images are')} {told}: {names}."


def set_complaint(finding: Finding, frame: "pd.DataFrame", *, where: str) -> str:
    """One paragraph on a set or classes that do not meet an expectation.

    Args:
        finding: The expectation and the rows.
        frame: The table that was looked at, classes or whole.
        where: Name of the folder of images, for the message.
    """
    rows = frame[frame[frame.columns[0]].astype("str").isin(finding.keys)]
    expected = finding.expectation
    if expected.table == "classes":
        text = _CLASSES[expected.name](rows, expected)
    else:
        text = _WHOLE[expected.name](rows.iloc[0], expected)
    return f"{where}: {text}"


def _with_counts(rows: "pd.DataFrame", column: str) -> str:
    """Labels with their counts, the smallest first: ``owl (4), wren (11)``."""
    values = rows.fillna({column: 0}).sort_values([column, "label"], kind="stable")
    return listed([f"{label} ({count:.0f})" for label, count in zip(values["label"], values[column], strict=True)])


def _plural(count: int, one: str, many: str) -> str:
    return f"{count:,} {one if count == 1 else many}"


def _it(rows: "pd.DataFrame", one: str, many: str) -> str:
    return one if len(rows) == 1 else many


def _classes(rows: Iterable[object]) -> str:
    return _plural(len(list(rows)), "class has", "classes have")


_CLASSES: dict[str, Callable[["pd.DataFrame", Expectation], str]] = {
    "enough images": lambda rows, expected: (
        f"{_classes(rows['label'])} fewer than {expected.min_value:g} images: {_with_counts(rows, 'images')}.\n"
        f"validate_data.min_images_per_class is {expected.min_value:g}. Add images, or lower it in params.yaml."
    ),
    "enough train images": lambda rows, expected: (
        f"{_classes(rows['label'])} fewer than {expected.min_value:g} images in train: {_with_counts(rows, 'train')}.\n"
        f"validate_data.min_train_images_per_class is {expected.min_value:g}. Add images, or lower it in params.yaml."
    ),
    "known in train": lambda rows, _: (
        f"{_classes(rows['label'])} val or test images but none in train: {listed(list(rows['label']))}.\n"
        "Nobody can learn a class without an example. Add images of it to train (more images, where splits are not "
        "given by folders), or remove it from val and test."
    ),
    "in val": lambda rows, _: (
        f"{_classes(rows['label'])} no image in val, so fine-tuning is judged without them: "
        f"{listed(list(rows['label']))}. {_SPLIT_REMEDY.format(split='val')}"
    ),
    "in test": lambda rows, _: (
        f"{_classes(rows['label'])} no image in test, so nothing will be known of their accuracy: "
        f"{listed(list(rows['label']))}. {_SPLIT_REMEDY.format(split='test')}"
    ),
    "one spelling": lambda rows, _: (
        f"labels that differ only in case or outer spaces count as different classes: {listed(list(rows['label']))}."
    ),
    "known class": lambda rows, _: (
        f"{_classes(rows['label'])} come since the last accepted set: {_with_counts(rows, 'images')}. "
        f"{_it(rows, 'It is', 'They are')} appended to the outputs."
    ),
    "class still there": lambda rows, _: (
        f"{_classes(rows['label'])} vanished since the last accepted set: {listed(sorted(rows['label']))}. "
        f"{_it(rows, 'Its id stays its own', 'Their ids stay their own')}; the next model does not know "
        f"{_it(rows, 'it', 'them')}."
    ),
    "same name": lambda rows, _: (
        f"{_classes(rows['label'])} likely been renamed since the last accepted set, by their images: "
        + listed([f"{old} is now {new}" for old, new in zip(rows["earlier_label"], rows["label"], strict=True)])
        + ". A renamed class is a new output: give it back its name where that was not meant."
    ),
}


def _shifted(name: str) -> Callable[["pd.Series", Expectation], str]:
    return lambda row, expected: (
        f"the {name.replace('_', ' ')} of the images moved since the last accepted set: population stability index "
        f"{row[expected.column]:.2f}, validate_data.max_shift is {expected.max_value:g}. Was that meant?"
    )


_SPLIT_REMEDY = (
    "Add images; or, where folders give the splits, put some there; "
    "or raise index_images.{split}_fraction in params.yaml."
)
_WHOLE: dict[str, Callable[["pd.Series", Expectation], str]] = {
    "any images": lambda *_: "no image is left to train on.\nAdd images that decode with `tanuki add PATH`.",
    "several classes": lambda *_: (
        "only one class is left.\nA classifier needs two or more. Add images of another class."
    ),
    "little lost": lambda row, expected: (
        f"{row['lost_fraction']:.1%} of the images had to be left out.\n"
        f"validate_data.max_quarantined_fraction is {expected.max_value:g}. Mend or remove those images, or raise it "
        "in params.yaml."
    ),
    "any train images": lambda *_: (
        "no image is in train.\nAdd images, put some into the train folder, or lower index_images.test_fraction and "
        "val_fraction in params.yaml."
    ),
    "any test images": lambda *_: (
        f"no image is in test, so no model could be judged.\n{_SPLIT_REMEDY.format(split='test')}"
    ),
    "any val images": lambda *_: (
        "no image is in val, so fine-tuning cannot be judged and is left out. " + _SPLIT_REMEDY.format(split="val")
    ),
    "balanced": lambda row, expected: (
        f"the most frequent class has {row['class_ratio']:.0f} times the train images of the least frequent "
        f"(validate_data.max_class_ratio is {expected.max_value:g}); look at the balanced accuracy."
    ),
    "groups whole": lambda row, _: (
        f"{_plural(int(row['straddling_groups']), 'group', 'groups')} of near-duplicates lie in more than one of the "
        f"splits that folders give, so the test result will be too good: {row['straddling_images']}."
    ),
    **{f"same {name}": _shifted(name) for name in SHIFTS},
}
