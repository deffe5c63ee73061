"""``mlm-dist report``: how a run went, from the files of its directory alone.

``run`` reads them; ``facts`` puts what they say into tables; ``summary``, ``panels``, ``timeline`` and ``compare`` draw pictures; ``page`` is the
HTML around both; ``command`` writes it all.
"""
