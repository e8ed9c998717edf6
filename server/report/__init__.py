"""`report.html`: one page that a coordinator can read, from `result.json` alone."""
