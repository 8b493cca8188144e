"""What the expectations look at: the manifest with what comparing images tells, one row a class, one row for all.

A value is missing (NaN) where a question makes no sense, so that one mistake is told once.
"""

import numpy as np
import pandas as pd

from tasks.data.expectations import SHIFTS, STATISTICS
from tasks.data.set_summary import SetSummary, likely_renamed, population_shift
from tasks.data.splits import SPLITS

MAX_STRADDLING_NAMED = 10
MIN_IMAGES_FOR_USUAL = 30
MAD_OF_NORMAL = 0.6745  # median absolute deviation of a normal distribution, in standard deviations


def image_table(manifest: pd.DataFrame) -> pd.DataFrame:
    """One row an image of the manifest, with the columns that expectations on images need.

    Of the same bytes in several places only one is kept: that in test, else in val, else in train (a copy in train of a
    test image would be learnt by heart), and there the first by path. The same bytes under two labels are all refused,
    because nobody can know which label is right.

    Returns:
        The manifest with ``short_side_px``, ``aspect_ratio``, ``labels_of_content`` (labels that the same bytes
        carry), ``kept_elsewhere`` (1 where another split keeps the bytes, else 0), ``earlier_copies`` (copies before
        this one in the same split) and ``twin`` (path of the image that the last three speak of, or empty);
        ``labels_of_group`` (labels of a near-duplicate group, of images that are not the same bytes) and
        ``group_twin`` (the group's first image under another label, or empty); ``mode_fraction`` and
        ``format_fraction`` (share of the images that are of this image's kind), ``brightness_z``, ``contrast_z`` and
        ``sharpness_z``: see `robust_z`.
    """
    table = manifest.copy()
    decodes = table["error"].isna()
    short, long = table[["width", "height"]].min(axis=1), table[["width", "height"]].max(axis=1)
    table["short_side_px"] = short.where(decodes).astype("float64")
    table["aspect_ratio"] = (long / short.clip(lower=1)).where(decodes).astype("float64")
    table["labels_of_content"] = table.groupby("sha256")["label"].transform("nunique")
    rank = table["split"].map({"test": 0, "val": 1, "train": 2})
    single = decodes & (table["labels_of_content"] == 1)
    strongest = rank.groupby(table["sha256"]).transform("min")
    table["kept_elsewhere"] = (single & (rank > strongest)).astype("int64")
    earlier = table.groupby(["sha256", "split"]).cumcount()  # the manifest is sorted by path
    table["earlier_copies"] = earlier.where(single & (rank == strongest), 0).astype("int64")
    table["twin"] = _twins(table, rank)
    table["labels_of_group"] = table[single].groupby("group")["label"].transform("nunique").astype("float64")
    table["group_twin"] = _group_twins(table)
    for kind in ("mode", "format"):
        known = table.loc[decodes, kind]
        table[f"{kind}_fraction"] = known.groupby(known).transform("size") / len(known)
    for name in STATISTICS:
        values = table[name].where(decodes).astype("float64")
        if name == "sharpness":
            values = values.map(np.log1p)  # a variance: its logarithm is what spreads evenly
        table[f"{name}_z"] = robust_z(values)
    return table


def robust_z(values: "pd.Series[float]") -> "pd.Series[float]":
    """Distance of each value from the median, in standard deviations as the median absolute deviation tells them.

    Missing where fewer than 30 values, or a deviation of zero, say too little of what is usual.

    References:
        Iglewicz and Hoaglin 1993, "How to detect and handle outliers" (the modified z-score).
    """
    distance = values - values.median()
    mad = distance.abs().median()
    if values.count() < MIN_IMAGES_FOR_USUAL or not mad > 0:
        return values * np.nan
    return MAD_OF_NORMAL * distance / mad


def _group_twins(table: pd.DataFrame) -> "pd.Series[str]":
    """Path of the first near-duplicate under another label; empty where there is none."""
    twins = dict.fromkeys(table["path"], "")
    for _, group in table[table["labels_of_group"] > 1].groupby("group"):
        for path, label in zip(group["path"], group["label"], strict=True):
            twins[path] = str(group.loc[group["label"] != label, "path"].iloc[0])
    return table["path"].map(twins)


def _twins(table: pd.DataFrame, rank: "pd.Series[int]") -> "pd.Series[str]":
    """Path of the copy that is kept, or, under two labels, of the first one with another label; empty where none."""
    twins = dict.fromkeys(table["path"], "")
    copies = table.assign(rank=rank)[table["sha256"].duplicated(keep=False)]
    for _, group in copies.sort_values(["rank", "path"]).groupby("sha256"):
        for path, label in zip(group["path"], group["label"], strict=True):
            others = group if group["label"].nunique() == 1 else group[group["label"] != label]
            twins[path] = str(others["path"].iloc[0])
    return table["path"].map(twins)


def class_table(
    manifest: pd.DataFrame, accepted: pd.DataFrame, *, now: SetSummary, before: SetSummary | None
) -> pd.DataFrame:
    """One row a label of the manifest, counting accepted images, and one a label that vanished since the last set.

    Returns:
        ``label``, ``images``, ``train``, ``train_of_held_out`` (train images of a class that has val or test images),
        ``val``, ``test`` and ``spellings`` (labels that differ from this in case or outer spaces alone, with itself);
        ``new``, ``vanished`` and ``renamed`` (1 where it is so since the last set, else 0; a renamed one is neither of
        the others) and ``earlier_label`` (of a renamed one, else empty).
    """
    labels = sorted(set(manifest["label"]))
    counts = pd.crosstab(accepted["label"], accepted["split"]).reindex(index=labels, columns=list(SPLITS), fill_value=0)
    table = counts.astype("float64").reset_index(names="label")
    table.columns.name = None
    table["label"] = table["label"].astype("str")
    table["images"] = table[list(SPLITS)].sum(axis=1)
    held_out = table["val"] + table["test"] > 0
    table["train_of_held_out"] = table["train"].where(held_out)
    table["train"] = table["train"].where(table["train"] > 0)
    for split in ("val", "test"):
        table[split] = table[split].where((table["images"] > 0) & bool(table[split].sum() > 0))
    spelling = table["label"].str.strip().str.casefold()
    table["spellings"] = spelling.groupby(spelling).transform("size").astype("float64")
    return _with_changes(table, now, before)


def _with_changes(table: pd.DataFrame, now: SetSummary, before: SetSummary | None) -> pd.DataFrame:
    """The table of classes with what changed since the last set, and a row for each label that vanished."""
    earlier = set() if before is None else set(before.images_per_class)
    renamed = {} if before is None else likely_renamed(before, now)
    vanished = sorted(earlier - set(now.images_per_class) - set(renamed.values()))
    gone = [label for label in vanished if label not in set(table["label"])]
    table = pd.concat([table, pd.DataFrame({"label": gone}, dtype="str")], ignore_index=True)
    new = set(now.images_per_class) - earlier - set(renamed) if before is not None else set()
    for column, labels in (("new", new), ("vanished", vanished), ("renamed", renamed)):
        table[column] = table["label"].isin(list(labels)).astype("float64")
    table["earlier_label"] = [renamed.get(label, "") for label in table["label"]]
    return table


def whole_table(
    images: pd.DataFrame, accepted: pd.DataFrame, *, num_lost: int, now: SetSummary, before: SetSummary | None
) -> pd.DataFrame:
    """One row for the whole set.

    Args:
        images: As `image_table` gives it.
        accepted: Its rows that are not quarantined.
        num_lost: Quarantined images whose content is not in the set any more (a copy loses nothing).
        now: Summary of the accepted rows.
        before: Of the set that was accepted before it, if there is one.

    Returns:
        ``name``, ``images``, ``classes``, ``train``, ``val``, ``test``, ``lost_fraction``, ``class_ratio`` (most over
        least frequent class in train), ``straddling_groups`` (near-duplicate groups that official splits tear apart),
        ``straddling_images`` (the images of the first of those), and ``class_mix_shift``, ``brightness_shift``,
        ``contrast_shift``, ``sharpness_shift`` and ``size_shift`` since the set before.
    """
    splits = accepted["split"].value_counts()
    straddling = _straddling_images(accepted)
    in_train = accepted.loc[accepted["split"] == "train", "label"].value_counts()
    any_left = len(accepted) > 0
    row: dict[str, object] = {
        "name": "the whole set",
        "images": float(len(accepted)),
        "classes": float(accepted["label"].nunique()) if any_left else np.nan,
        **{split: float(splits.get(split, 0)) if any_left else np.nan for split in SPLITS},
        "lost_fraction": num_lost / max(1, len(images)),
        "class_ratio": float(in_train.max() / in_train.min()) if len(in_train) else np.nan,
        "straddling_groups": float(len(straddling)),
        "straddling_images": ", ".join(" ~ ".join(paths) for paths in straddling[:MAX_STRADDLING_NAMED]),
        **{f"{name}_shift": np.nan for name in SHIFTS},
        **({} if before is None else {f"{name}_shift": far for name, far in population_shift(before, now).items()}),
    }
    return pd.DataFrame([row])


def _straddling_images(accepted: pd.DataFrame) -> list[list[str]]:
    """Paths of each near-duplicate group that official splits tear apart."""
    if not accepted["official_split"].any():
        return []
    num_splits = accepted.groupby("group")["split"].transform("nunique")
    torn = accepted[num_splits > 1]
    return [[str(path) for path in paths] for _, paths in torn.groupby("group")["path"]]
