"""The load generator: a schedule drawn beforehand, one epoll loop per process, times stamped by the kernel.

Its report says how each number was made, and whether the generator itself was in the way.
"""
