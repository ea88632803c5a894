# SPDX-License-Identifier: Apache-2.0
"""What the benchmark of posting through verbs reads of callgrind's profile."""

from __future__ import annotations

from bench import verbs_cost

PROFILE = """\
version: 1
positions: line
ob=(1) /somewhere/program
fl=(1) one.c
fn=(1) first
10 5
+2 7
cob=(2) /somewhere/libdevice.so
cfn=(2) second
calls=3 20
12 1000
* 1
ob=(2)
fn=(2)
20 40
-1 2
ob=(1)
fn=(3) third
30 100
"""


def test_a_profile_is_summed_by_object() -> None:
    assert verbs_cost.by_object(PROFILE) == {"program": 113, "libdevice.so": 42}
