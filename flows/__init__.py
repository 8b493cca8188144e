"""WHEN AND WHETHER: the only importer of prefect, the only caller of git and dvc."""
