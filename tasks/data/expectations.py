"""What is expected of a set of images, as data, and Great Expectations holding the set to it.

Three tables are looked at (see set_tables): images, classes and the whole set. What an unmet expectation does is its
action: stop the run, quarantine the image (leave it out), or warn.
"""

import logging
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Literal

if TYPE_CHECKING:
    import pandas as pd

Action = Literal["stop", "quarantine", "warn"]
Table = Literal["images", "classes", "whole"]

SEVERITY: Final[dict[Action, str]] = {"stop": "critical", "quarantine": "warning", "warn": "info"}
STATISTICS: Final = ("brightness", "contrast", "sharpness")
SHIFTS: Final = ("class_mix", *STATISTICS, "size")
KEY: Final[dict[Table, str]] = {"images": "path", "classes": "label", "whole": "name"}


@dataclass(frozen=True)
class Expectation:
    """A column must stay between two values, or, where both are None, be missing.

    Args:
        name: What is expected.
        table: Which table holds the column.
        column: The column; missing values meet every expectation.
        action: What an unmet expectation does.
        min_value: Smallest value that is good, if there is one.
        max_value: Largest value that is good, if there is one.
    """

    name: str
    table: Table
    column: str
    action: Action
    min_value: float | None = None
    max_value: float | None = None


@dataclass(frozen=True)
class Finding:
    """An unmet expectation and the rows that do not meet it, by key (path or label), in the table's order."""

    expectation: Expectation
    keys: tuple[str, ...]


def expectations(
    *,
    min_images_per_class: int,
    min_train_images_per_class: int,
    max_class_ratio: float,
    max_quarantined_fraction: float,
    min_side_px: int,
    max_aspect_ratio: float,
    min_kind_fraction: float,
    max_robust_z: float,
    max_shift: float,
) -> tuple[Expectation, ...]:
    """All that is expected of a set; the arguments are those of validate_data in params.yaml."""
    return (
        Expectation("decodes", "images", "error", "quarantine"),
        Expectation("large enough", "images", "short_side_px", "quarantine", min_value=min_side_px),
        Expectation("no strip", "images", "aspect_ratio", "quarantine", max_value=max_aspect_ratio),
        Expectation("one label", "images", "labels_of_content", "quarantine", max_value=1),
        Expectation("in one split", "images", "kept_elsewhere", "quarantine", max_value=0),
        Expectation("no copy", "images", "earlier_copies", "quarantine", max_value=0),
        Expectation("usual mode", "images", "mode_fraction", "warn", min_value=min_kind_fraction),
        Expectation("usual format", "images", "format_fraction", "warn", min_value=min_kind_fraction),
        *(
            Expectation(f"usual {name}", "images", f"{name}_z", "warn", min_value=-max_robust_z, max_value=max_robust_z)
            for name in STATISTICS
        ),
        Expectation("one label a group", "images", "labels_of_group", "warn", max_value=1),
        Expectation("any images", "whole", "images", "stop", min_value=1),
        Expectation("several classes", "whole", "classes", "stop", min_value=2),
        Expectation("little lost", "whole", "lost_fraction", "stop", max_value=max_quarantined_fraction),
        Expectation("any train images", "whole", "train", "stop", min_value=1),
        Expectation("any test images", "whole", "test", "stop", min_value=1),
        Expectation("any val images", "whole", "val", "warn", min_value=1),
        Expectation("balanced", "whole", "class_ratio", "warn", max_value=max_class_ratio),
        Expectation("groups whole", "whole", "straddling_groups", "warn", max_value=0),
        *(Expectation(f"same {name}", "whole", f"{name}_shift", "warn", max_value=max_shift) for name in SHIFTS),
        Expectation("enough images", "classes", "images", "stop", min_value=min_images_per_class),
        Expectation("enough train images", "classes", "train", "stop", min_value=min_train_images_per_class),
        Expectation("known in train", "classes", "train_of_held_out", "stop", min_value=1),
        Expectation("in val", "classes", "val", "warn", min_value=1),
        Expectation("in test", "classes", "test", "warn", min_value=1),
        Expectation("one spelling", "classes", "spellings", "warn", max_value=1),
        Expectation("known class", "classes", "new", "warn", max_value=0),
        Expectation("class still there", "classes", "vanished", "warn", max_value=0),
        Expectation("same name", "classes", "renamed", "warn", max_value=0),
    )


class Validator:
    """Great Expectations on tables in memory. It remembers every check, for the pages at the end."""

    def __init__(self) -> None:
        # Its import alone logs a hundred lines of its own bookkeeping at level INFO.
        logging.getLogger("great_expectations").setLevel(logging.WARNING)
        with warnings.catch_warnings():
            # 2026-11: importing great-expectations 1.24 warns of Python's sre_constants.
            warnings.simplefilter("ignore")
            import great_expectations as gx  # 5 s, so only where it is used
            from great_expectations.data_context.types import base

            config = base.DataContextConfig(
                store_backend_defaults=base.InMemoryStoreBackendDefaults(),
                data_docs_sites={},
                progress_bars=base.ProgressBarsConfig(globally=False),
                analytics_enabled=False,
            )
            self._context: Any = gx.get_context(mode="ephemeral", project_config=config)
        self._gx: Any = gx
        self._source: Any = self._context.data_sources.add_pandas("tanuki")

    def check(self, table: Table, frame: "pd.DataFrame", expected: Sequence[Expectation]) -> tuple[Finding, ...]:
        """Holds a table to its expectations.

        Args:
            table: Which one it is.
            frame: Its rows.
            expected: Expectations; those on other tables are left aside.

        Returns:
            The unmet ones, in the order of ``expected``.
        """
        mine = [each for each in expected if each.table == table]
        with warnings.catch_warnings():
            # 2026-11: great-expectations 1.24 calls what pandas 3 has deprecated.
            warnings.simplefilter("ignore")
            results = self._run(table, frame, mine)
        return tuple(
            finding for each in mine if (finding := _finding(each, results[each.name], KEY[table])) is not None
        )

    def write_pages(self, docs_dir: Path) -> None:
        """Writes all checks so far as a static site (Data Docs) for a person.

        Args:
            docs_dir: The folder of the site.
        """
        with warnings.catch_warnings():
            # 2026-11: great-expectations 1.24 calls what pandas 3 has deprecated.
            warnings.simplefilter("ignore")
            self._context.add_data_docs_site("tanuki", _site(docs_dir))
            self._context.build_data_docs()

    def _run(self, table: Table, frame: "pd.DataFrame", expected: Sequence[Expectation]) -> dict[str, Any]:
        """Great Expectations' result of each expectation, by name."""
        gx, context = self._gx, self._context
        batch = self._source.add_dataframe_asset(table).add_batch_definition_whole_dataframe("all")
        suite = context.suites.add(
            gx.ExpectationSuite(table, expectations=[_gx_expectation(gx, each) for each in expected])
        )
        definition = context.validation_definitions.add(gx.ValidationDefinition(name=table, data=batch, suite=suite))
        checkpoint = gx.Checkpoint(
            name=table,
            validation_definitions=[definition],
            result_format={"result_format": "COMPLETE", "unexpected_index_column_names": [KEY[table]]},
        )
        outcome = context.checkpoints.add(checkpoint).run(batch_parameters={"dataframe": frame})
        (result,) = outcome.run_results.values()
        return {each.expectation_config.meta["name"]: each for each in result.results}


def _site(docs_dir: Path) -> Mapping[str, object]:
    return {
        "class_name": "SiteBuilder",
        "show_how_to_buttons": False,
        "store_backend": {"class_name": "TupleFilesystemStoreBackend", "base_directory": str(docs_dir)},
        "site_index_builder": {"class_name": "DefaultSiteIndexBuilder"},
    }


def _gx_expectation(gx: Any, expected: Expectation) -> Any:
    common = {
        "column": expected.column,
        "severity": SEVERITY[expected.action],
        "meta": {"name": expected.name, "action": expected.action},
        "notes": f"{expected.name}: otherwise {expected.action}",
    }
    if expected.min_value is None and expected.max_value is None:
        return gx.expectations.ExpectColumnValuesToBeNull(**common)
    return gx.expectations.ExpectColumnValuesToBeBetween(
        min_value=expected.min_value, max_value=expected.max_value, **common
    )


def _finding(expected: Expectation, result: Any, key: str) -> Finding | None:
    if result.success:
        return None
    rows = result.result.get("unexpected_index_list")
    if rows is None:
        raise RuntimeError(f"Great Expectations could not check {expected.name!r}: {result.exception_info}")
    return Finding(expected, tuple(str(row[key]) for row in rows))
