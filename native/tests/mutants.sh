#!/bin/sh
# SPDX-License-Identifier: Apache-2.0
# Breaks the counting rules one by one in a copy of the sources: the property test has to notice each.
set -eu
cd "$(dirname "$0")/.."
out=../build/mutants
rm -rf "$out"
mkdir -p "$out"
failed=0

# mutant NAME FILE FROM TO [TEST]
mutant() {
	copy="$out/native"
	rm -rf "$copy"
	mkdir -p "$copy"
	cp -r Makefile core include providers shm tests "$copy"
	if ! grep -qF -- "$3" "$copy/$2"; then
		echo "  STALE $1: $2 has no \"$3\""
		failed=1
		return
	fi
	python3 - "$copy/$2" "$3" "$4" <<'PY'
import pathlib, sys
path, old, new = pathlib.Path(sys.argv[1]), sys.argv[2], sys.argv[3]
path.write_text(path.read_text().replace(old, new, 1))
PY
	if make -s -C "$copy" check TESTS="${5:-property}" >"$out/$1.log" 2>&1; then
		echo "  ALIVE $1: the property test did not notice"
		failed=1
	elif grep -q "error:" "$out/$1.log"; then
		echo "  BUILD $1: see $out/$1.log"
		failed=1
	else
		echo "  ok    $1: $(grep -m 1 'seed' "$out/$1.log")"
	fi
}

mutant weight-of-a-part core/cut.c "job->open ? 8 / job->shard_count : 8" "8"
mutant nothing-taken-out core/counter.c "session->counts[slot].eighths -= (int64_t)units;" "(void)units;"
mutant count-before-data core/cut.c "return shard->length > rail->segment_bytes;" "return false;"
mutant landed-not-believed core/conn.c "oldest->imm_number <= landed &&" "oldest->imm_number <= landed / 2 &&"
mutant landed-too-much core/conn.c "oldest->imm_number <= landed &&" "oldest->imm_number <= landed + 1 &&"
mutant fence-at-once core/fence.c "return true;" "return false;"
mutant sent-twice core/channel.c "call->imm_number <= far_landed" "call->imm_number < far_landed" mailbox_property
mutant waiters-forgotten core/mailbox.c "wake_one(mailbox);" "(void)0;" mailbox_property
mutant ready-overtakes core/send.c "open->readies == readies" "open->readies >= readies" mailbox_property
mutant slot-taken-twice core/mailbox.c "mailbox->free[--mailbox->free_count]" "mailbox->free[mailbox->free_count - 1]" mailbox_property
mutant turn-lost core/shard.c "tfd_send_unpark(open);" "(void)0;" mailbox_property
exit $failed
