"""Many images: rows of any input asked one after another, each exactly once, and written to one output.

For: a job that resumes, that never ends because of one bad image, and whose output joins to its input. Refuses to know
HTTP servers and anything native.
"""
