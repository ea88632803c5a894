# SPDX-License-Identifier: Apache-2.0
"""``transferctl bench``: measures this host's daemon against another, or against itself.

A *target* (``target.py``) lends memory; an *initiator* (``runner.py``) has its workers
(``worker.py``) move bytes to or from it, one *step* of the sweep (``sweep.py``) after the other,
and has what landed compared. The two speak by mailboxes (``link.py``): no port and no right but
those that transferd itself gives.
"""
