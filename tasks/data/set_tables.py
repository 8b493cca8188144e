"""What the expectations look at: the manifest with what comparing images tells, one row a class, one row for all.

A value is missing (NaN) where a question makes no sense, so that one mistake is told once.
"""

import numpy as np
import pandas as pd

from tasks.data.splits import SPLITS

MAX_STRADDLING_NAMED = 10


def image_table(manifest: pd.DataFrame) -> pd.DataFrame:
    """One row an image of the manifest, with the columns that expectations on images need.

    Of the same bytes in several places only one is kept: that in test, else in val, else in train (a copy in train of a
    test image would be learnt by heart), and there the first by path. The same bytes under two labels are all refused,
    because nobody can know which label is right.

    Returns:
        The manifest with ``short_side_px``, ``aspect_ratio``, ``labels_of_content`` (labels that the same bytes
        carry), ``kept_elsewhere`` (1 where another split keeps the bytes, else 0), ``earlier_copies`` (copies before
        this one in the same split) and ``twin`` (path of the image that the last three speak of, or empty).
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
    return table


def _twins(table: pd.DataFrame, rank: "pd.Series[int]") -> "pd.Series[str]":
    """Path of the copy that is kept, or, under two labels, of the first one with another label; empty where none."""
    twins = dict.fromkeys(table["path"], "")
    copies = table.assign(rank=rank)[table["sha256"].duplicated(keep=False)]
    for _, group in copies.sort_values(["rank", "path"]).groupby("sha256"):
        for path, label in zip(group["path"], group["label"], strict=True):
            others = group if group["label"].nunique() == 1 else group[group["label"] != label]
            twins[path] = str(others["path"].iloc[0])
    return table["path"].map(twins)


def class_table(manifest: pd.DataFrame, accepted: pd.DataFrame) -> pd.DataFrame:
    """One row a label of the manifest, counting accepted images.

    Returns:
        ``label``, ``images``, ``train``, ``train_of_held_out`` (train images of a class that has val or test images),
        ``val``, ``test`` and ``spellings`` (labels that differ from this in case or outer spaces alone, with itself).
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
    return table


def whole_table(images: pd.DataFrame, accepted: pd.DataFrame, *, num_lost: int) -> pd.DataFrame:
    """One row for the whole set.

    Args:
        images: As `image_table` gives it.
        accepted: Its rows that are not quarantined.
        num_lost: Quarantined images whose content is not in the set any more (a copy loses nothing).

    Returns:
        ``name``, ``images``, ``classes``, ``train``, ``val``, ``test``, ``lost_fraction``, ``class_ratio`` (most over
        least frequent class in train), ``straddling_groups`` (near-duplicate groups that official splits tear apart)
        and ``straddling_images`` (the images of the first of those).
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
    }
    return pd.DataFrame([row])


def _straddling_images(accepted: pd.DataFrame) -> list[list[str]]:
    """Paths of each near-duplicate group that official splits tear apart."""
    if not accepted["official_split"].any():
        return []
    num_splits = accepted.groupby("group")["split"].transform("nunique")
    torn = accepted[num_splits > 1]
    return [[str(path) for path in paths] for _, paths in torn.groupby("group")["path"]]
