"""The commands, one file each. A job is the only body of its command: `linearize.cli` parses its arguments and prints
its result, `linearize.api` names the public ones.

Nothing below the jobs imports one of them. A job imports torch at its top, so the command line imports it last.
"""
