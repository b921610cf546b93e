"""The command line `ppvae`: `main` dispatches to one module a command, each with a function `run(args) -> exit status`.

`options` holds the options of every command, `flags` reads them from the command line and TOML files, `common` has what
several commands do: build a pair, find a run and its data, write the report.
"""
