"""Tables and figures of a paper, each a recipe (a TOML file) that is planned, run, and drawn from the store."""
