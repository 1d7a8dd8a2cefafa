"""The report in HTML: a page for each case and one for the cohort, each a single file that needs no network."""
