"""``mlm-dist doctor``: does this laptop, or this allocation, have what a run needs; which host has not, and what to do.

It is a job like any other: one process, or one rank of what a launcher starts. Each rank looks at what only it can see
(``host``, ``job``), the ranks measure what lies between them (``network``), and rank 0 judges (``judge_*``) and prints
(``show``). Facts travel through the key-value store of the rendezvous (``meeting``), never through the collectives that are
being judged: a network that does not work is a finding, and a rank that does not come is named.

Everything is bounded in time, and all but one thing grows at most linearly in ranks: a rank sends a few kilobytes to rank 0, which
reads them one after the other; the clocks of n hosts take n round trips; links are measured around a ring, in two or three
phases whatever n. The one is the group of all ranks, which connects each to each other one, as training does.
"""
