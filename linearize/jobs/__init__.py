"""The commands, one file each: the only body of a command, which `linearize.cli` and `linearize.api` call.

No module below the jobs imports one of them.
"""
