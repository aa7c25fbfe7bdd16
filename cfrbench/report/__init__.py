"""From scores to what a person reads: tidy frames, summaries, tables. Stands on pandas, which each module imports."""
