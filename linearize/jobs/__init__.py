"""The commands, one file each. A job is the only implementation of its command: `linearize.cli` parses the arguments
and prints the result, `linearize.api` exports the public jobs.

No lower room imports a job. Jobs import torch at the top, so the command line imports them lazily.
"""
