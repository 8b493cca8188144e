"""WHAT: one module a stage, and the library under them. The only importer of torch; no Prefect, no DVC, no git."""
