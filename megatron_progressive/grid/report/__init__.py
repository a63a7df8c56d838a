"""The report of a study: verdicts, laws, figures and the page."""
