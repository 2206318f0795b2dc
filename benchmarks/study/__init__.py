"""Does it learn? Small decoders that differ in their attention alone, on tasks that need to look far back.

docs/study.md says what is asked and what was found; `python -m study --help`, from benchmarks/, what can be run.
"""
