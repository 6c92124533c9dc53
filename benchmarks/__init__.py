"""Speed, measured in one run against the plain way: ``make bench``."""
