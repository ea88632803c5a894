#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Breaks the counting rules one by one in copies of the sources: the property test has to notice each.
# Each processor has a copy, in which only what depends on the broken file is built anew.
set -euo pipefail
cd "$(dirname "$0")/.."
out=$PWD/../build/mutants
workers=$(nproc)
rm -rf "$out"
mkdir -p "$out"

# mutant NAME FILE FROM TO [TEST]
mutant() {
	local file="$copy/$2" log="$out/$1.log" ended=0
	count=$((count + 1))
	[[ $((count % workers)) == "$worker" ]] || return 0
	if ! grep -qF -- "$3" "$2"; then
		echo "  STALE $1: $2 has no \"$3\""
		failed=1
		return 0
	fi
	python3 - "$file" "$3" "$4" <<'PY'
import pathlib, sys
path, old, new = pathlib.Path(sys.argv[1]), sys.argv[2], sys.argv[3]
path.write_text(path.read_text().replace(old, new, 1))
PY
	TFD_OPERATIONS=100000 make -s -C "$copy" check TESTS="${5:-property}" >"$log" 2>&1 || ended=$?
	cp "$2" "$file"
	if [[ $ended == 0 ]] || grep -q "status 124" "$log"; then
		echo "  ALIVE $1: the property test did not notice"
		failed=1
	elif grep -q "error:" "$log"; then
		echo "  BUILD $1: see $log"
		failed=1
	else
		echo "  ok    $1: $(grep -m 1 'seed' "$log" || true)"
	fi
}

mutants() {
	mutant weight-of-a-part core/cut.c "job->open ? 8 / job->parts : 8" "8"
	mutant armed-not-found core/job.c "		tfd_shard_enter(&job->shards[i]);" "		if (i) tfd_shard_enter(&job->shards[i]);"
	mutant armed-too-early core/armed.c "tfd_heap_first(&watch->jobs)->key <= value" "tfd_heap_first(&watch->jobs)->key <= value + 1"
	mutant armed-stays-armed core/armed.c "	job->watch = NULL;" "	(void)0;"
	mutant nothing-taken-out core/counter.c "session->counts[slot].eighths -= (int64_t)units;" "(void)units;"
	mutant count-before-data core/cut.c "return shard->length > rail->segment_bytes;" "return false;"
	mutant page-before-data core/cut.c " || job->length > rail->segment_bytes;" ";"
	mutant exact-is-not core/cut.c "if (job->flags & (TFD_FLAG_EXACT | TFD_FLAG_CHECKSUM))" "if (job->flags & TFD_FLAG_CHECKSUM)"
	mutant exact-of-a-part core/shard.c "(job->flags & TFD_FLAG_EXACT) && !job->data_left)" "(job->flags & TFD_FLAG_EXACT))"
	mutant landed-not-believed core/conn.c "oldest->imm_number <= landed_of(oldest, far) &&" "oldest->imm_number <= landed_of(oldest, far) / 2 &&"
	mutant last-landed-not-believed core/conn.c "oldest->imm_number <= landed_of(oldest, far) &&" "oldest->imm_number < landed_of(oldest, far) &&" softverbs_core
	mutant landed-too-much core/conn.c "oldest->imm_number <= landed_of(oldest, far) &&" "oldest->imm_number <= landed_of(oldest, far) + 1 &&"
	mutant landed-of-another-channel core/conn.c "wr->job->priority)];" "0 * wr->job->priority)];"
	mutant landed-in-one-order core/worker.c "conn->orders[wc->order].landed++;" "conn->orders[0].landed++;"
	mutant posted-in-one-order core/post.c "job->priority)].posted +=" "0 * job->priority)].posted +="
	mutant channel-out-of-bounds core/worker.c "wc->order >= rail->orders" "wc->order >= 99" core_orders
	mutant channel-that-stands core/post.c "i < conn->rail->orders; i++" "i < 1; i++" core_orders
	mutant channel-not-proven core/probe.c "+ 1 < conn->rail->orders" "+ 1 < 1" core_orders
	mutant counts-moved-twice core/shard.c "shard->units_posted = shard->units_acked;" "shard->units_posted = 0;"
	mutant moved-does-not-trail core/shard.c "shard->units_owed = 0; /*" "/*"
	mutant pages-counted-twice core/post.c "shard->units_owed += 8 * sum->extent;" "shard->units_owed += 16 * sum->extent;"
	mutant run-cut-short core/post.c "sum->extent = extent;" "sum->extent = plan->extent + 0 * extent;"
	mutant run-counted-first core/post.c "if (piece == last) {" "if (piece == first) {"
	mutant page-posted-twice core/post.c "if (shard->state == TFD_SHARD_DATA && shard->batch)" "if (shard->state == TFD_SHARD_DATA && shard->batch && sum->bytes)"
	mutant pack-posted-twice core/pages.c "shard->batch->next += pieces;" "shard->batch->next++;"
	mutant pack-not-acknowledged core/pages.c "extent += piece[i].pages;" "extent += 0;" core_packing
	mutant part-elsewhere core/pages.c ".remote_address = remote + piece[i].dst_offset," ".remote_address = remote + piece[0].dst_offset,"
	mutant pages-overtaken core/pages.c "return rail->info.ordered || shard->trails;" "return rail->info.ordered || shard->length;"
	mutant loss-not-told core/job.c "tfd_loss_tell(&job->shards[0], job->status, job->detail);" "(void)0;"
	mutant target-not-told core/shard.c "tfd_loss_tell(shard, job->part_status, job->detail);" "(void)0;"
	mutant too-much-told core/loss.c "event.count = (loss.units - loss.unknown) / 8;" "event.count = (loss.units - loss.unknown) / 8 + 1;"
	mutant landed-not-told core/loss.c "event.units = loss.acked;" "event.units = 0;"
	mutant parts-of-the-dead core/counter.c "session->counts[(*at)->slot].eighths -= (*at)->units;" "(void)0;"
	mutant parts-not-noted core/counter.c "fraction_add(session, slot, peer, units);" "(void)peer;"
	mutant parts-noted-twice core/counter.c "fraction_add(session, slot, peer, -(int64_t)units);" "(void)peer;"
	mutant value-falls core/counter.c "if (whole <= (int64_t)count->value)" "if (whole == (int64_t)count->value)"
	mutant gate-without-fault core/counter.c "value + (count->faults != count->acknowledged ? TFD_GATE_FAULT : 0)" "value"
	mutant never-acknowledged core/counter.c "session->counts[slot].acknowledged = session->counts[slot].faults;" "(void)0;"
	mutant ends-before-quiet core/job.c "if (job->inflight || (job->status" "if ((job->inflight && job->status == TFD_JOB_PENDING) || (job->status"
	mutant fence-at-once core/fence.c "if (fence->left)" "if (0)"
	mutant fence-forgets-the-ring core/fence.c "tfd_session_take_published(worker, call->session);" "(void)worker;"
	mutant quiet-at-once core/open.c "if (open->refused && tfd_list_empty(&open->shards))" "if (open->refused)"
	mutant published-forgotten core/session.c "if (session->state >= TFD_STATE_ENDING)
		return 0;
	take_published(" "if (session->state >= TFD_STATE_ENDING)
		return 0;
	if (session->refs == UINT32_MAX) take_published("
	mutant sent-twice core/channel.c "call->imm_number <= landed" "call->imm_number < landed" mailbox_property
	mutant waiters-forgotten core/mailbox.c "wake_one(mailbox);" "(void)0;" mailbox_property
	mutant ready-overtakes core/send.c "open->readies == readies" "open->readies >= readies" mailbox_property
	mutant slot-taken-twice core/mailbox.c "mailbox->free[--mailbox->free_count]" "mailbox->free[mailbox->free_count - 1]" mailbox_property
	mutant never-compared core/verify.c "crc == frame->argument ?" "crc != frame->argument + 1 ?" core_checksum
	mutant counted-before-compared core/shard.c "if (job->status == TFD_JOB_PENDING && tfd_verify_wanted(shard)) {" "if (job->status == TFD_JOB_STATUS_COUNT) {" core_checksum
	mutant turn-lost core/shard.c "tfd_send_unpark(open);" "(void)0;" mailbox_property
	mutant turn-saved-up core/schedule.c "if (!--flow->shards && flow->deficit > 0)" "if (!--flow->shards && flow->deficit > 1 << 30)" core_schedule
	mutant turn-without-going core/schedule.c "if (lane && flow->deficit <= 0)" "if (flow->deficit <= 0)" core_schedule
	mutant no-weight core/schedule.c "(int64_t)QUANTUM * weight" "(int64_t)(QUANTUM + 0 * weight)" core_schedule
	mutant never-charged core/schedule.c "flow->deficit -= (int64_t)charge;" "(void)flow;" core_schedule
	mutant bulk-starves core/schedule.c "rail->lead <= LEAD_MAX" "rail->lead <= UINT64_MAX" core_schedule
	mutant never-resumed core/schedule.c "conn->holds[priority] = false;" "(void)0;" core_schedule
	mutant order-lost core/schedule.c "age_of_shard(lane->shards.prev) <= age)" "age_of_shard(lane->shards.prev) != age + (1ull << 60))" core_schedule
	mutant credits-not-needed core/parts.h "return conn->credits.taken < conn->credits.limit;" "return conn->credits.limit != 0;" core_credits
	mutant credits-not-needed-at-random core/parts.h "return conn->credits.taken < conn->credits.limit;" "return conn->credits.limit != 0;"
	mutant asked-before-acknowledged core/credits.c "credits->asked = credits->acked;" "credits->asked = credits->taken;" core_credits
	mutant no-room-for-questions core/credits.c "#define RESERVED 2u" "#define RESERVED 0u" core_credits
	mutant counts-need-no-credit core/post.c "if (plan.units && !tfd_credits_may_post(conn)) {" "if (plan.units > 8 && !tfd_credits_may_post(conn)) {" core_credits
	mutant bytes-need-credits core/post.c "if (plan.units && !tfd_credits_may_post(conn)) {" "if (!tfd_credits_may_post(conn)) {" core_credits
	mutant nobody-released core/credits.c "for (; left && (lane" "for (; left > 1 && (lane" core_credits
	mutant creditless-forgotten core/conn.c "tfd_credits_move(conn, detail);" "(void)detail;" core_credits_faults
	mutant never-given-up core/credits.c "now_ns - conn->credits.stalled_ns > STALL_BOUND_NS" "now_ns == 1" core_credits
	mutant given-up-too-soon core/credits.c "if (!conn->started || !is_stalled(conn))" "if (!conn->started || (!is_stalled(conn) && !conn->credits.stalled_ns))" core_credits
	mutant share-kept core/conn.c "tfd_credits_close(conn, drained && conn->rail->info.ordered);" "(void)drained;" core_credits_faults
	mutant share-free-at-once core/conn.c "drained && conn->rail->info.ordered" "drained" core_credits_faults
	mutant more-than-there-is core/credits.c "if (share > rail->credits_free)" "if (!share)" core_credits_faults
	mutant seen-unasked core/credits.c "if (!credits->asking || number != credits->number)" "if (number != credits->number)" core_credits_faults
	mutant seen-of-another core/credits.c "if (!credits->asking || number != credits->number)" "if (!credits->asking || number == UINT64_MAX)" core_credits_faults
	mutant asked-twice core/credits.c "if (credits->due & TFD_CREDIT_SEEN) {" "if (credits->due == UINT8_MAX) {" core_credits_faults
	mutant flood-not-seen core/worker.c "++conn->imms_landed > conn->credits.flood_at" "++conn->imms_landed == 0" core_credits_faults
	mutant flood-where-none-is core/credits.c "credits->flood_at = conn->imms_landed + credits->share;" "credits->flood_at += 1;" core_credits
	mutant half-of-a-frame core/channel.c "frame->check != checksum(frame, payload)" "frame->check != checksum(frame, payload) * 0 + frame->check" core_channel
	mutant pace-without-bound core/pace.c "return rail->pace.bulk_bytes < rail->pace.bulk_most;" "return rail != NULL;" core_pace
	mutant pace-of-who-stands core/pace.c "now_ns - order->progress_ns > 2 * conn->bound_ns" "0" core_pace
	mutant pace-never-more core/pace.c "pace->boost += pace->boost < BOOST_MOST ? pace->boost / 8 : 0;" "(void)0;" core_pace
	mutant pace-never-ends core/pace.c "now_ns - pace->urgent_ns >= URGENT_NS" "0" core_pace
	mutant gone-carries-on core/rail.c "	conns_break(worker, rail, true);" "	(void)0;" core_rails
	mutant down-at-once core/rail.c "#define DOWN_BOUND_NS 1000000000u" "#define DOWN_BOUND_NS 1u" core_rails
	mutant down-for-ever core/rail.c ">= DOWN_BOUND_NS" "== 1" core_rails
	mutant gone-takes-connections core/conn.c "rc = tfd_rail_usable(" "rc = 0 * tfd_rail_usable(" core_rails
	mutant gone-refuses-memory core/region.c "rc && tfd_rail_state(rail) != TFD_RAIL_GONE)" "rc)" core_rails
	mutant posts-from-nothing core/region.c "tfd_rail_gone(worker, &worker->group->rails[i]);" "(void)worker;" core_rails
	mutant fatal-not-heard core/rail.c "else if (wc->owner)" "else if (wc->owner && wc->wr)" core_rails
	mutant copied-by-anybody core/take.c "return open->rights & TFD_RIGHT_MAP ? TFD_DETAIL_NONE : TFD_DETAIL_RIGHTS;" "return TFD_DETAIL_NONE;" core_copied
	mutant copied-from-the-host core/take.c "if (!region->device || !open->device ||" "if (!region || !open->device ||" core_copied
	mutant copied-to-the-host core/take.c "if (!region->device || !open->device ||" "if (!region->device ||" core_copied
	mutant copied-unarmed core/ring.c "(entry->flags & needed) != needed ||" "!(entry->flags & needed) ||" core_copied
	mutant copied-and-posted core/post.c "if (shard->job->flags & TFD_FLAG_COPIED)" "if (shard->job->flags == UINT8_MAX)" core_copied
	mutant copied-pages-unchecked core/post.c "	return tfd_batch_fill(shard);" "	return 0;" core_copied
	mutant copied-pages-twice core/post.c "if (left > TFD_BATCH_PIECES)" "if (left > TFD_BATCH_PIECES / 2)" core_copied
	mutant copied-without-bytes core/wr.c "if (!(job->flags & TFD_FLAG_COPIED))" "if (sum)" core_copied
	mutant copies-not-waited-for core/job.c "|| tfd_copied_runs(job))" "|| 0)" core_copied_ends
	mutant targets-not-waited-for core/job.c "if (!shard->inflight && !tfd_copied_runs(job))" "if (!shard->inflight)" core_copied_ends
	mutant copies-waited-for-ever core/deadline.c "if (job->copy_until_ns && (" "if (0 && (" core_copied_ends
	mutant void-too-late core/copied.c "return waits(job);" "return true;" core_copied_ends
	mutant void-another-s core/copied.c "if (expected != TFD_COPY_MARK(job->armed.key))" "if (0)" core_copied_ends
	mutant targets-not-left-out core/copied.c "if (waits(job))" "if (0)" core_copied_ends
	mutant given-up-untold core/fence.c "fence->detail = TFD_DETAIL_STILL_COPIED;" "(void)fence;" core_copied_ends
	mutant no-path-to-a-device core/take.c "if (!tfd_open_reaches(open, region))" "if (open->path_count > 1000)" core_copied
	mutant waits-in-the-way core/post.c "if (rc == -EBUSY) {" "if (rc == 1) {" core_staged_wait
	mutant waits-for-ever core/wait.c "return worker->now_ns - shard->waits_ns <= conn->rail->patience_ns;" "return worker->now_ns - shard->waits_ns <= conn->rail->patience_ns + (1ull << 40);" core_staged_wait
	mutant waits-for-one-chain core/post.c "shard->tries * 0xd1b54a32d192ed03ull" "0 * shard->tries" core_staged_wait
	mutant waits-and-is-lost core/conn.c "tfd_waits_move(conn, detail);" "(void)0;" core_staged_wait
	mutant told-to-the-next providers/staged/stages.c "if (memory->failed && waited)" "if (memory->failed && (waited || number))" staged_memories
	mutant slots-too-many providers/staged/half.c "half->run_count * TFD_STAGES_SLOT_BYTES," "half->run_count * TFD_STAGES_SLOT_BYTES + 64," staged_hostile
	mutant slots-can-be-read providers/staged/half.c "TFD_MR_WRITABLE | TFD_MR_UNREADABLE, &half" "TFD_MR_WRITABLE, &half" staged_hostile
	mutant slots-not-clean providers/staged/stages.c "if (slot->used)" "if (slot->used && 0)" staged_slots
	mutant slots-in-use providers/staged/stages.c "stages->slots[i].half || stages->slots[i].left ?" "stages->slots[i].half ?" staged_slots
	mutant void-not-numbered core/worker.c "conn->orders[wc->order].landed += wc->imm != 0;" "(void)wc;" core_staged_wait
	mutant void-known-at-once core/conn.c "conn->imms_landed < conn->void_until" "0" core_staged_wait
	mutant a-byte-is-left core/parts.h "left == segment + 1 && segment > 1" "left == segment + 1 && segment < 1" core_staged
	mutant a-byte-is-taken core/cut.c "return bytes != 1 ||" "return bytes != 1u << 31 ||" core_staged
}

# work NUMBER: those of the mutants whose turn it is
work() {
	worker=$1
	count=0
	failed=0
	copy=$out/tree$worker/native
	mkdir -p "$copy"
	cp -r Makefile core include providers shm tests "$copy"
	mutants
	return $failed
}

pids=()
for ((i = 0; i < workers; i++)); do
	work $i &
	pids+=($!)
done
failed=0
for pid in "${pids[@]}"; do
	wait "$pid" || failed=1
done
exit $failed
