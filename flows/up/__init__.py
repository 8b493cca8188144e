"""`tanuki up`: everything that one box needs, started and stopped as one."""
