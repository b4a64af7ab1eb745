"""The subcommands of `mrpo`, one module each: `add_parser(commands)` declares one, `run(args)` returns its exit status.

Modules are imported at every start of the command, so they import what is heavy inside `run`. Input that the user can
mend is a `UserError`; `mrpo.cli` prints it and ends with status 2. Status 1 says that a command that checks something
found problems.
"""
