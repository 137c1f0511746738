"""The command line: arguments and configs in, a Trainer's subcommand run, an exit code out."""
