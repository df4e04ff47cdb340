"""Many models, many runs, figures, reports."""
